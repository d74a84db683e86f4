// Pictures of an analysis, drawn from their data as wide as the page lets them be: text keeps its size, panels stand
// below one another where the page is narrow, and the pointer or the arrow keys read the values.
ready(() => {
  "use strict";
  const { element, drawn, number } = qsa;
  const HEIGHT = 210;
  let clips = 0;

  const transforms = {
    linear: () => (value) => value,
    log: () => (value) => (value > 0 ? Math.log10(value) : NaN),
    asinh: (width) => (value) => Math.asinh(value / width),
    symlog: (width) => (value) => Math.sign(value) * (Math.abs(value) <= width ? Math.abs(value) / width / 0.9
      : 1 / 0.9 + Math.log10(Math.abs(value) / width)),
  };
  // Data → pixels along an axis of the data.
  const scaleOf = (axis, from, to) => {
    const move = (transforms[axis.scale] || transforms.linear)(axis.width);
    const [low, high] = axis.ends.map(move);
    return (value) => (value === null ? NaN : from + ((move(value) - low) / (high - low || 1)) * (to - from));
  };
  // A logarithmic axis has no 0: what is drawn from 0 begins at the edge.
  const within = (place, one, other) => {
    const [low, high] = [Math.min(one, other), Math.max(one, other)];
    return Number.isFinite(place) ? Math.min(Math.max(place, low), high) : one;
  };
  const glyph = (marker, x, y, size) => ({
    "^": `M${x} ${y - size}L${x + size} ${y + size}L${x - size} ${y + size}Z`,
    v: `M${x} ${y + size}L${x + size} ${y - size}L${x - size} ${y - size}Z`,
    s: `M${x - size} ${y - size}h${2 * size}v${2 * size}h${-2 * size}Z`,
    D: `M${x} ${y - size * 1.3}L${x + size * 1.3} ${y}L${x} ${y + size * 1.3}L${x - size * 1.3} ${y}Z`,
  }[marker] || `M${x - size} ${y}a${size} ${size} 0 1 0 ${2 * size} 0a${size} ${size} 0 1 0 ${-2 * size} 0Z`);
  const joined = (points) => {
    let pen = "M";
    return points.map(([x, y]) => {
      if (!Number.isFinite(x) || !Number.isFinite(y)) { pen = "M"; return ""; }
      const step = `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
      return step;
    }).join("");
  };

  const shapes = {
    line: (mark, { x, y, box }) => {
      const points = mark.across ? [[box.left, y(mark.y[0])], [box.right, y(mark.y[0])]]
        : mark.x.map((at, index) => [x(at), y(mark.y[index])]);
      const found = [];
      if (mark.joined) {
        found.push(drawn("path", { d: joined(points), stroke: mark.colour, "stroke-dasharray": mark.dash,
          "stroke-width": Math.max(mark.wide, 1), opacity: mark.faint ? 0.5 : 1 }));
      }
      if (mark.marker) {
        const chosen = mark.marked === "all" ? points : mark.marked.map((index) => points[index]);
        const size = Math.max(mark.size / 2, 1.3) * (mark.joined ? 1.2 : 1);
        const text = chosen.filter((point) => point.every(Number.isFinite))
          .map(([at, height]) => glyph(mark.marker, Number(at.toFixed(1)), Number(height.toFixed(1)), size)).join("");
        found.push(drawn("path", { d: text, stroke: mark.colour, "stroke-width": mark.hollow ? 1 : 0,
          opacity: mark.faint ? 0.5 : 1, style: `fill:${mark.hollow ? "#fff" : mark.colour}` }));
      }
      return found;
    },
    area: (mark, { x, y, box }) => {
      const edge = (values) => mark.x.map((at, index) => [x(at), within(y(values[index]), box.bottom, box.top)]);
      // A gap ends one outline and begins another.
      const gaps = [...mark.x.keys()].filter((index) => mark.x[index] === null);
      const [low, high] = [edge(mark.low), edge(mark.high)];
      const outline = [-1, ...gaps].map((gap, index) => {
        const [from, to] = [gap + 1, gaps[index] === undefined ? mark.x.length : gaps[index]];
        return `${joined([...low.slice(from, to), ...high.slice(from, to).reverse()])}Z`;
      });
      return [drawn("path", { d: outline.join(""), style: `fill:${mark.colour}` })];
    },
    bars: (mark, { x, y, box }) => mark.ends.flatMap(([from, to, low, high]) => {
      const across = [x(from), x(to)].map((place) => within(place, box.left, box.right)).sort((a, b) => a - b);
      const along = [y(low), y(high)].map((place) => within(place, box.bottom, box.top)).sort((a, b) => a - b);
      const size = { x: across[0], y: along[0], width: Math.max(across[1] - across[0], 0.8), height: Math.max(along[1] - along[0], 0) };
      const bar = drawn("rect", { ...size, style: `fill:${mark.colour}` });
      return mark.hatched ? [bar, drawn("rect", { ...size, style: "fill:url(#hatch)" })] : [bar];
    }),
    segments: (mark, { x, y }) => mark.ends.map(([from, to, low, high]) => drawn("line", {
      x1: x(from), x2: x(to), y1: y(low), y2: y(high), stroke: mark.colour, "stroke-width": mark.wide,
    })),
    steps: (mark, { x, y }) => [drawn("path", { stroke: mark.colour, "stroke-dasharray": mark.dash, "stroke-width": 1.4,
      d: joined(mark.values.flatMap((value, index) => [[x(mark.edges[index]), y(value)], [x(mark.edges[index + 1]), y(value)]])) })],
    image: (mark, { box }) => [drawn("image", { href: mark.source, x: box.left, y: box.top, class: "map",
      width: box.right - box.left, height: box.bottom - box.top, preserveAspectRatio: "none" })],
  };

  // Ticks that have room: a label that would touch the one before it is left out.
  const axes = (svg, panel, { x, y, box, narrow }) => {
    let end = -Infinity;
    panel.x.ticks.forEach(([at, name]) => {
      const half = narrow ? 5 : name.length * 3.1;
      if (x(at) - half < end + 4) return;
      end = x(at) + half;
      if (x(at) < box.left - 1 || x(at) > box.right + 1) return;
      svg.append(drawn("line", { x1: x(at), x2: x(at), y1: box.bottom, y2: box.bottom + 3, class: "tick" }));
      svg.append(drawn("text", narrow ? { transform: `translate(${x(at) + 4} ${box.bottom + 6}) rotate(-90)`, "text-anchor": "end" }
        : { x: x(at), y: box.bottom + 15, "text-anchor": "middle" }, name));
    });
    let last = Infinity;
    [...panel.y.ticks].sort((a, b) => y(b[0]) - y(a[0])).forEach(([at, name]) => {
      if (y(at) > last - 13) return;
      last = y(at);
      if (!panel.horizontal) svg.append(drawn("line", { x1: box.left, x2: box.right, y1: y(at), y2: y(at), class: "grid" }));
      svg.append(drawn("text", { x: box.left - 6, y: y(at) + 3.5, "text-anchor": "end" }, name));
    });
    svg.append(drawn("text", { x: (box.left + box.right) / 2, y: box.height - 3, "text-anchor": "middle" }, panel.x.label));
    if (panel.y.label && !panel.horizontal) svg.append(drawn("text", { x: 2, y: 11 }, panel.y.label));
  };

  // What each mark says at a place: place → words. A place is the middle of a bar, a point or a step.
  const valuesOf = (panel) => {
    const found = new Map();
    const add = (place, text) => { if (place !== null) found.set(place, [...(found.get(place) || []), text]); };
    // A key may say how many there are in all, `sinks: 63`, which is no name of this one.
    const named = (mark, text) => (mark.label || mark.name ? `${(mark.label || mark.name).replace(/: \d+$/, "")} ${text}` : text);
    panel.marks.forEach((mark) => {
      if (mark.kind === "line" && !mark.across) {
        mark.x.forEach((at, index) => { if (mark.y[index] !== null) add(at, named(mark, number(mark.y[index]))); });
      } else if (mark.kind === "area") {
        const seen = new Set();
        mark.x.forEach((at, index) => {
          if (seen.has(at) || mark.low[index] === null) return;
          seen.add(at);
          add(at, named(mark, `${number(mark.low[index])} … ${number(mark.high[index])}`));
        });
      } else if (mark.kind === "steps") {
        mark.values.forEach((value, index) => { if (value !== null) add(mark.edges[index], named(mark, number(value))); });
      } else if (mark.kind === "bars" || (mark.kind === "segments" && mark.label)) {
        mark.ends.forEach(([from, to, low, high]) => {
          const [place, least, most] = panel.horizontal ? [(low + high) / 2, from, to] : [(from + to) / 2, low, high];
          if (least === most && mark.kind === "bars") return;
          const text = least === most || (mark.kind === "bars" && (least === 0 || mark.hatched)) ? number(most - (mark.hatched ? least : 0))
            : `${number(least)} … ${number(most)}`;
          add(Number(place.toPrecision(6)), named(mark, text));
        });
      }
    });
    return found;
  };

  const reader = (svg, panel, { x, y, box, alone }, say) => {
    const found = valuesOf(panel);
    const places = [...found.keys()].sort((a, b) => a - b);
    if (!places.length) return;
    const axis = panel.horizontal ? panel.y : panel.x;
    const pixel = panel.horizontal ? y : x;
    const cursor = drawn("line", { class: "cursor", visibility: "hidden" });
    svg.append(cursor);
    let at = -1;
    const choose = (index) => {
      at = index;
      const place = pixel(places[at]);
      const ends = panel.horizontal ? { x1: box.left, x2: box.right, y1: place, y2: place } : { x1: place, x2: place, y1: box.top, y2: box.bottom };
      Object.entries({ ...ends, visibility: "visible" }).forEach(([key, value]) => cursor.setAttribute(key, value));
      const tick = axis.ticks.find(([there]) => Math.abs(there - places[at]) < 1e-9);
      const name = tick ? tick[1] : number(places[at]);
      const what = axis.label.split(" (")[0];
      const where = panel.horizontal ? name : what.includes("*") ? what.replace("*", name) : `${what} ${name}`;
      say(`${alone || !panel.title ? "" : `${panel.title}, `}${where}: ${found.get(places[at]).join(" · ")}`);
    };
    svg.addEventListener("pointermove", (event) => {
      const rect = svg.getBoundingClientRect();
      const there = panel.horizontal ? event.clientY - rect.top : event.clientX - rect.left;
      choose(places.reduce((best, place, index) => (Math.abs(pixel(place) - there) < Math.abs(pixel(places[best]) - there) ? index : best), 0));
    });
    const leave = () => { at = -1; cursor.setAttribute("visibility", "hidden"); say(""); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      choose(Math.min(Math.max(at + step, 0), places.length - 1));
      event.preventDefault();
    });
  };

  // A map's colours are read back: the nearest of the scale's 256 says the value.
  const mapReader = (svg, panel, { box }, colours, say) => {
    const mark = panel.marks.find((each) => each.kind === "image");
    if (!mark || !colours) return;
    const [columns, rows] = mark.size;
    const image = new Image();
    let pixels = null;
    image.onload = () => {
      const canvas = element("canvas", { width: columns, height: rows });
      const paper = canvas.getContext("2d", { willReadFrequently: true });
      paper.drawImage(image, 0, 0);
      pixels = paper.getImageData(0, 0, columns, rows).data;
    };
    image.src = mark.source;
    const table = colours.table.map((colour) => [1, 3, 5].map((from) => parseInt(colour.slice(from, from + 2), 16)));
    svg.addEventListener("pointermove", (event) => {
      if (!pixels) return;
      const rect = svg.getBoundingClientRect();
      const across = Math.floor(((event.clientX - rect.left - box.left) / (box.right - box.left)) * columns);
      const down = Math.floor(((event.clientY - rect.top - box.top) / (box.bottom - box.top)) * rows);
      if (across < 0 || down < 0 || across >= columns || down >= rows) { say(""); return; }
      const colour = pixels.slice(4 * (down * columns + across), 4 * (down * columns + across) + 3);
      const far = (entry) => entry.reduce((sum, part, index) => sum + (part - colour[index]) ** 2, 0);
      const nearest = table.reduce((best, entry, index) => (far(entry) < far(table[best]) ? index : best), 0);
      const share = nearest / 255;
      const value = colours.log ? colours.low * (colours.high / colours.low) ** share : colours.low + share * (colours.high - colours.low);
      const span = (index, count, whole) => {
        const [first, last] = [Math.floor((index * whole) / count), Math.ceil(((index + 1) * whole) / count) - 1];
        return first >= last ? first : `${first}–${last}`;
      };
      const whole = [mark.ends[1] - mark.ends[0], Math.abs(mark.ends[3] - mark.ends[2])];
      const sign = nearest === 255 ? "at least " : nearest === 0 ? "at most " : "about ";
      say(`${panel.title}, token ${span(down, rows, whole[1])}, channel ${span(across, columns, whole[0])}: ${sign}${number(value.toPrecision(2))}`);
    });
    svg.addEventListener("pointerleave", () => say(""));
  };

  const paint = (panel, width, { colours, panels }, title, say) => {
    const longest = Math.max(0, ...panel.y.ticks.map(([, name]) => name.length));
    const left = panel.horizontal ? Math.min(longest * 6.4 + 10, width * 0.45) : Math.max(34, longest * 6.2 + 10);
    // Many short names, such as those of channels, stand upright.
    const upright = panel.x.ticks.length > 12 && panel.x.ticks.length * 13 < width - left
      && panel.x.ticks.every(([at], index) => index === 0 || at - panel.x.ticks[index - 1][0] === 1);
    const rows = panel.horizontal ? 22 * Math.max(panel.y.ticks.length, 3) + 50 : HEIGHT;
    const height = rows + (upright ? 14 : 0);
    const box = { left, right: width - 10, top: panel.horizontal ? 4 : 18, bottom: height - (upright ? 46 : 32), height };
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0,
      "aria-label": panel.title ? `${title}: ${panel.title}` : title, class: "depth-plot" });
    const [x, y] = [scaleOf(panel.x, box.left, box.right), scaleOf(panel.y, box.bottom, box.top)];
    const space = { x, y, box, narrow: upright, alone: panels.length === 1 };
    axes(svg, panel, space);
    // What lies beyond the axes is not drawn; the markers at their ends are drawn whole.
    const clip = drawn("clipPath", { id: `clip-${clips += 1}` });
    clip.append(drawn("rect", { x: box.left - 6, y: box.top - 6, width: box.right - box.left + 12, height: box.bottom - box.top + 12 }));
    svg.append(clip);
    const marks = drawn("g", { "clip-path": `url(#clip-${clips})`, class: panel.marks.some((mark) => mark.kind === "image") ? "" : "light" });
    panel.marks.forEach((mark) => marks.append(...shapes[mark.kind](mark, space)));
    svg.append(marks);
    panel.texts.forEach(({ at, text }) => {
      const [across, along] = [x(at[0]), y(at[1])];
      const late = !panel.horizontal && across > (box.left + box.right) / 2;
      svg.append(drawn("text", { x: across + (late ? -6 : panel.horizontal ? 2 : 6), y: Math.max(along - (panel.horizontal ? -4 : 5), 10), class: "named",
        "text-anchor": late ? "end" : "start" }, text));
    });
    reader(svg, panel, space, say);
    mapReader(svg, panel, space, colours, say);
    return svg;
  };

  // The key of all labelled marks, each with its own sign.
  const keysOf = (chart) => {
    const labels = new Map();
    chart.panels.forEach((panel) => panel.marks.forEach((mark) => { if (mark.label && !labels.has(mark.label)) labels.set(mark.label, mark); }));
    if (labels.size < 2) return null;
    const keys = element("p", { class: "keys" });
    labels.forEach((mark, label) => {
      const key = element("span", { class: "key" });
      const sign = drawn("svg", { width: 24, height: 12, "aria-hidden": "true", class: "depth-plot" });
      const group = drawn("g", { class: "light" });
      const space = { x: (at) => at, y: (at) => at, box: { left: 0, right: 24, top: 0, bottom: 12 } };
      const solid = ["area", "bars"].includes(mark.kind);
      const shown = solid ? { kind: "bars", ends: [[1, 22, 2, 10]], colour: mark.colour, hatched: mark.hatched }
        : { ...mark, kind: "line", across: false, x: [1, 12, 23], y: [6, 6, 6], marked: [1], joined: mark.joined !== false, wide: mark.wide || 1.4 };
      group.append(...shapes[shown.kind](shown, space));
      sign.append(group);
      key.append(sign, label);
      keys.append(key);
    });
    return keys;
  };

  const scaleKey = (colours) => {
    const key = element("p", { class: "keys" });
    const bar = element("span", { class: "ramp" });
    bar.style.background = `linear-gradient(90deg, ${colours.table.filter((_, index) => index % 15 === 0).join(", ")})`;
    key.append(element("span", {}, `|x| ${number(colours.low)}`), bar, element("span", {}, `${number(colours.high)} and more${colours.log ? ", logarithmic" : ""}`));
    return key;
  };

  document.querySelectorAll("figure.chart").forEach((figure) => {
    const chart = JSON.parse(figure.querySelector("script").textContent);
    const title = figure.querySelector("figcaption").firstChild.textContent;
    const readout = element("p", { class: "readout quiet", role: "status" });
    const say = (text) => { readout.textContent = text || "Point at the picture for its values."; };
    say("");
    const grid = element("div", { class: "panels" });
    grid.style.setProperty("--columns", chart.columns);
    const said = chart.title === title.trim() ? [] : [chart.title];
    [...said, ...chart.notes].forEach((note) => figure.append(element("p", { class: "quiet caption" }, note)));
    const keys = chart.colours ? scaleKey(chart.colours) : keysOf(chart);
    if (keys) figure.append(keys);
    figure.append(grid);
    const slots = chart.panels.map((panel) => {
      const box = element("div", { class: "panel" });
      if (panel.message) box.append(element("p", { class: "quiet empty" }, panel.message));
      else if (panel.title) box.append(element("p", { class: "quiet caption" }, panel.title));
      grid.append(box);
      return [panel, box];
    });
    if (chart.panels.some((panel) => !panel.message)) figure.append(readout);
    const watcher = new ResizeObserver(() => slots.forEach(([panel, box]) => {
      const width = Math.floor(box.clientWidth);
      if (panel.message || !width || box.painted === width) return;
      box.painted = width;
      const old = box.querySelector("svg");
      if (old) old.remove();
      box.append(paint(panel, width, chart, title, say));
    }));
    slots.forEach(([, box]) => watcher.observe(box));
  });
});
