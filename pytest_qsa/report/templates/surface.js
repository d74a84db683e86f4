// A surface of |x| over tokens and channels that turns: painter's algorithm on a canvas, no WebGL, no library.
ready(() => {
  "use strict";
  // cividis (Nuñez, Anderton and Renslow 2018): its lightness grows evenly.
  const STOPS = [[0, 34, 78], [35, 62, 108], [87, 92, 109], [123, 123, 121], [165, 156, 116], [210, 193, 92], [254, 232, 56]];
  const short = (x) => (x && (x >= 1e5 || x < 1e-3) ? x.toExponential(1) : String(Number(x.toPrecision(3))));

  document.querySelectorAll(".surface").forEach((box) => {
    const data = JSON.parse(box.querySelector("script").textContent);
    const canvas = box.querySelector("canvas");
    const choice = box.querySelector("select");
    const logarithmic = box.querySelector("input");
    const said = box.querySelector(".surface-said");
    const paper = canvas.getContext("2d");
    const angles = { elevation: data.elevation, azimuth: data.azimuth };
    let quads = [];
    let pointed = null;

    const colour = (share) => {
      const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
      const low = Math.min(Math.floor(at), STOPS.length - 2);
      return `rgb(${STOPS[low].map((from, i) => Math.round(from + (STOPS[low + 1][i] - from) * (at - low))).join(",")})`;
    };

    const shape = () => {
      const layer = data.layers[choice.selectedIndex];
      const columns = layer.values.length / layer.rows;
      const peak = Math.max(...layer.values);
      const positive = layer.values.filter((value) => value > 0).sort((a, b) => a - b);
      const floor = positive.length ? positive[Math.floor(positive.length / 100)] : 0;
      const logged = (value) => (value > floor && peak > floor ? Math.log(value / floor) / Math.log(peak / floor) : 0);
      const height = (value) => (logarithmic.checked ? logged(value) : peak ? value / peak : 0);
      return { layer, columns, peak, logged, height };
    };

    const draw = () => {
      const { layer, columns, peak, logged, height } = shape();
      const width = canvas.clientWidth;
      const tall = Math.round(Math.min(width * 0.66, 480));
      const ratio = Math.min(devicePixelRatio || 1, 2);
      if (canvas.width !== width * ratio || canvas.height !== tall * ratio) {
        canvas.width = width * ratio;
        canvas.height = tall * ratio;
        canvas.style.height = `${tall}px`;
      }
      const style = getComputedStyle(box);
      paper.setTransform(ratio, 0, 0, ratio, 0, 0);
      paper.clearRect(0, 0, width, tall);
      const [turn, tilt] = [angles.azimuth, angles.elevation].map((degrees) => (degrees * Math.PI) / 180);
      const scale = Math.min(width, tall * 1.35) * 0.54;
      // x and y in [-0.5, 0.5], z in [0, 1]: turned about the upright axis, then tilted towards the eye.
      const project = (x, y, z) => {
        const across = -x * Math.sin(turn) + y * Math.cos(turn);
        const away = -(x * Math.cos(turn) + y * Math.sin(turn));
        const up = (z - 0.5) * 0.72;
        return [width / 2 + across * scale, tall * 0.47 - (up * Math.cos(tilt) + away * Math.sin(tilt)) * scale,
          away * Math.cos(tilt) - up * Math.sin(tilt)];
      };
      const last = [Math.max(layer.rows - 1, 1), Math.max(columns - 1, 1)];
      const points = layer.values.map((value, index) => {
        const [row, column] = [Math.floor(index / columns), index % columns];
        return project(column / last[1] - 0.5, row / last[0] - 0.5, height(value));
      });
      const line = (from, to) => { paper.beginPath(); paper.moveTo(from[0], from[1]); paper.lineTo(to[0], to[1]); paper.stroke(); };
      const corner = (x, y, z) => project(x - 0.5, y - 0.5, z);
      paper.strokeStyle = style.getPropertyValue("--line");
      paper.lineWidth = 1;
      [[0, 0, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 0, 0]].forEach(([a, b, c, d]) => line(corner(a, b, 0), corner(c, d, 0)));
      quads = [];
      for (let row = 0; row + 1 < layer.rows; row += 1) {
        for (let column = 0; column + 1 < columns; column += 1) {
          const corners = [row * columns + column, row * columns + column + 1,
            (row + 1) * columns + column + 1, (row + 1) * columns + column];
          const depth = corners.reduce((sum, at) => sum + points[at][2], 0);
          quads.push({ corners, depth, value: Math.max(...corners.map((at) => layer.values[at])), row, column });
        }
      }
      quads.sort((a, b) => b.depth - a.depth);
      quads.forEach((quad) => {
        paper.beginPath();
        quad.corners.forEach((at, i) => (i ? paper.lineTo(points[at][0], points[at][1]) : paper.moveTo(points[at][0], points[at][1])));
        paper.closePath();
        paper.fillStyle = paper.strokeStyle = colour(logged(quad.value));
        paper.fill();
        paper.stroke();
      });
      quads.forEach((quad) => { quad.at = points[quad.corners[0]]; });
      paper.fillStyle = style.getPropertyValue("--quiet");
      paper.font = "11px system-ui, sans-serif";
      const write = (text, [x, y], down = 14, align = "center") => {
        paper.textAlign = align;
        paper.fillText(text, Math.min(Math.max(x, 34), width - 34), Math.min(y + down, tall - 3));
      };
      // The two edges of the floor that are nearest to the eye carry the axes.
      const nearer = (a, b) => (a[2] < b[2] ? 0 : 1);
      const front = nearer(corner(0.5, 0, 0), corner(0.5, 1, 0));
      const side = nearer(corner(0, 0.5, 0), corner(1, 0.5, 0));
      [["channel", data.channels, (at) => corner(at, front, 0)], ["token", data.tokens, (at) => corner(side, at, 0)]]
        .forEach(([name, count, place]) => {
          // Away from the corner that both edges share, or their numbers meet there on a phone.
          const outwards = place(0.5)[0] < width / 2 ? "right" : "left";
          write("0", place(0.06), 14, outwards);
          write(`${name} →`, place(0.5), 20);
          write(String(count), place(0.94), 14, outwards);
        });
      const post = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([x, y]) => [corner(x, y, 0), corner(x, y, 1)])
        .sort((a, b) => a[0][0] - b[0][0])[0];
      paper.strokeStyle = style.getPropertyValue("--quiet");
      line(post[0], post[1]);
      write(short(peak), post[1], -5);
      const where = pointed && quads.find((quad) => quad.row === pointed.row && quad.column === pointed.column);
      if (where) {
        paper.strokeStyle = style.getPropertyValue("--ink");
        paper.lineWidth = 1.5;
        paper.beginPath();
        where.corners.forEach((at, i) => (i ? paper.lineTo(points[at][0], points[at][1]) : paper.moveTo(points[at][0], points[at][1])));
        paper.closePath();
        paper.stroke();
      }
      tell(layer, columns, peak, where);
    };

    const span = (index, count, whole) => {
      const cell = Math.ceil(whole / Math.max(count, 1));
      const from = index * cell;
      return cell > 1 ? `${from}–${Math.min(from + cell, whole) - 1}` : String(from);
    };
    const tell = (layer, columns, peak, where) => {
      const at = where ? where.corners.reduce((best, each) => (layer.values[each] > layer.values[best] ? each : best)) : layer.values.indexOf(peak);
      const place = `token ${span(Math.floor(at / columns), layer.rows, data.tokens)}, channel ${span(at % columns, columns, data.channels)}`;
      said.textContent = `${where ? "here" : "largest"}: |x| ${short(layer.values[at])} at ${place}`
        + (layer.holes ? `; ${layer.holes} values are NaN or Inf` : "");
      canvas.setAttribute("aria-label", `|x| of ${layer.layer} over ${data.tokens} tokens and ${data.channels} channels, `
        + `largest ${short(peak)}; the arrow keys turn it`);
    };

    let queued = false;
    const refresh = () => {
      if (queued) return;
      queued = true;
      requestAnimationFrame(() => { queued = false; draw(); });
    };
    const turnBy = (across, up) => {
      angles.azimuth = (angles.azimuth + across + 360) % 360;
      angles.elevation = Math.min(Math.max(angles.elevation + up, 0), 90);
      refresh();
    };
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [8, 0], ArrowRight: [-8, 0], ArrowUp: [0, 6], ArrowDown: [0, -6] }[event.key];
      if (!step) return;
      event.preventDefault();
      turnBy(...step);
    });
    let held = null;
    canvas.addEventListener("pointerdown", (event) => { held = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); });
    ["pointerup", "pointercancel"].forEach((name) => canvas.addEventListener(name, () => { held = null; }));
    canvas.addEventListener("pointermove", (event) => {
      if (held) {
        turnBy((held[0] - event.clientX) * 0.5, (event.clientY - held[1]) * 0.4);
        held = [event.clientX, event.clientY];
        return;
      }
      const [x, y] = [event.offsetX, event.offsetY];
      const near = quads.map((quad) => [(quad.at[0] - x) ** 2 + (quad.at[1] - y) ** 2, quad]).sort((a, b) => a[0] - b[0])[0];
      pointed = near && near[0] < 400 ? near[1] : null;
      refresh();
    });
    canvas.addEventListener("pointerleave", () => { pointed = null; refresh(); });
    choice.addEventListener("change", () => { pointed = null; refresh(); });
    logarithmic.addEventListener("change", refresh);
    new ResizeObserver(refresh).observe(canvas);
    new MutationObserver(refresh).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    draw();
  });
});
