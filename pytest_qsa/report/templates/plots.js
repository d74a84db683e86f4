// Plots over depth, drawn from the data of all layers as wide as the page lets them be: their text never shrinks.
const qsa = (() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const MOST_PANELS = 12;
  const made = (node, attributes, text) => {
    Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
    node.textContent = text;
    return node;
  };
  const element = (name, attributes = {}, text = "") => made(document.createElement(name), attributes, text);
  const drawn = (name, attributes = {}, text = "") => made(document.createElementNS(SVG, name), attributes, text);

  const parsed = (value) => Number(String(value).replace("inf", "Inf"));
  const number = (value) => {
    const x = parsed(value);
    if (!Number.isFinite(x)) return String(value).replace("Infinity", "∞").replace("-", "−");
    const size = Math.abs(x);
    const text = size && (size >= 1e7 || size < 1e-4) ? x.toExponential(2) : String(Number(x.toPrecision(4)));
    return text.replace("-", "−");
  };
  const share = (used) => {
    const x = Number(used);
    return Number.isFinite(x) ? (x >= 10 ? `${Math.round(x)} ×` : `${Math.round(100 * x)} %`) : "∞";
  };
  const allowed = (cell) => {
    const known = (key) => cell[key] !== undefined;
    if (known("low") && known("high")) {
      return cell.low === cell.high ? `= ${number(cell.low)}` : `${number(cell.low)} … ${number(cell.high)}`;
    }
    return known("high") ? `≤ ${number(cell.high)}` : known("low") ? `≥ ${number(cell.low)}` : "";
  };
  // What is known of a number, in words.
  const words = (cell) => {
    const said = [allowed(cell)];
    if (cell.baseline !== undefined) said.push(`baseline ${number(cell.baseline)}`);
    if (cell.reference !== undefined) said.push(`reference ${number(cell.reference)}`);
    if (cell.waived) said.push("out, but waived");
    if (cell.used !== undefined) said.push(`${share(cell.used)} used`);
    return said.filter(Boolean).join(" · ");
  };

  // Ticks at 1, 2 or 5 times a power of ten; on a logarithmic axis at the decades, or between them where these are few.
  const ticksOf = (low, high, log, most) => {
    if (log) {
      const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
      const step = Math.max(1, Math.ceil((last - first) / most));
      const found = [];
      for (let power = first; power <= last; power += step) {
        (last - first < 3 ? [1, 2, 5] : [1]).forEach((times) => found.push(times * 10 ** power));
      }
      return found.filter((tick) => tick >= low && tick <= high);
    }
    const raw = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((times) => times * power).find((each) => each >= raw);
    const found = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) {
      found.push(Math.abs(tick) < step / 1e6 ? 0 : tick);
    }
    return found;
  };

  // `values`: all that must be visible. Logarithmic where positive values span two decades.
  const scaleOf = (values, top, bottom) => {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    const log = low > 0 && high > 100 * low;
    const to = log ? Math.log10 : (value) => value;
    const from = log ? (value) => 10 ** value : (value) => value;
    const room = (to(high) - to(low)) || Math.abs(to(high)) || 1;
    const floor = low === 0 ? 0 : 0.08;
    [low, high] = [to(low) - floor * room, to(high) + 0.12 * room];
    const y = (value) => bottom - ((to(value) - low) / (high - low)) * (bottom - top);
    return { y, ticks: ticksOf(from(low), from(high), log, log ? 6 : 4) };
  };

  // One panel. `points`: what `column` shows at each layer of a kind; `lines`: name → a value for each point.
  const panel = (points, { width, height, lines, title, said, chosen }) => {
    const [left, right, top, bottom] = [54, width - 14, 16, height - 30];
    const numbers = points.map((point) => point.x);
    const [first, last] = [Math.min(...numbers), Math.max(...numbers)];
    const x = (at) => (last === first ? (left + right) / 2 : left + 6 + ((at - first) / (last - first)) * (right - left - 12));
    const known = (key) => points.map((point) => parsed(point[key])).filter(Number.isFinite);
    const all = [...Object.values(lines).flat().map(parsed).filter(Number.isFinite),
      ...["low", "high", "baseline", "reference"].flatMap(known)];
    const svg = drawn("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0, class: "depth-plot", "aria-label": title,
    });
    if (!all.length) all.push(0, 1);
    const { y, ticks } = scaleOf(all, top, bottom);
    ticks.forEach((tick) => {
      svg.append(drawn("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "grid" }));
      svg.append(drawn("text", { x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, number(tick)));
    });
    const spaced = Math.max(2, Math.floor((right - left) / 44));
    const marks = points[0].numbered ? ticksOf(first, Math.max(last, first + 1), false, spaced).filter((tick) => (
      Number.isInteger(tick) && tick <= last)) : [];
    marks.forEach((tick) => svg.append(drawn("text", { x: x(tick), y: bottom + 15, "text-anchor": "middle" }, tick)));
    svg.append(drawn("text", { x: (left + right) / 2, y: height - 2, "text-anchor": "middle", class: "axis" },
      points[0].numbered ? "block" : `${points.length} layers in the model's order`));
    const path = (values, name) => {
      let pen = "M";
      const text = values.map((value, index) => {
        if (!Number.isFinite(value)) { pen = "M"; return ""; }
        const step = `${pen}${x(points[index].x).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
        return step;
      }).join("");
      svg.append(drawn("path", { d: text, class: name }));
    };
    const column = (key) => points.map((point) => parsed(point[key] === undefined ? NaN : point[key]));
    if (known("baseline").length) {
      // An open side of the band ends at the edge of the plot.
      points.forEach((point) => {
        if (point.baseline === undefined) return;
        const [high, low] = ["high", "low"].map((key, side) => (
          point[key] === undefined ? [top, bottom][side] : y(parsed(point[key]))));
        const half = Math.max(2, (right - left) / points.length / 2);
        svg.append(drawn("rect", { x: x(point.x) - half, width: 2 * half, y: high, height: Math.max(low - high, 1), class: "band" }));
      });
      path(column("baseline"), "baseline");
    } else {
      ["low", "high"].filter((key) => known(key).length).forEach((key) => {
        const bounds = known(key);
        if (bounds.every((bound) => bound === bounds[0])) {
          svg.append(drawn("line", { x1: left, x2: right, y1: y(bounds[0]), y2: y(bounds[0]), class: "limit" }));
          svg.append(drawn("text", { x: right, y: y(bounds[0]) - 4, "text-anchor": "end", class: "bound" },
            `${key === "high" ? "max" : "min"} ${number(bounds[0])}`));
        } else path(column(key), "limit");
      });
    }
    path(column("reference"), "reference");
    Object.entries(lines).forEach(([name, values], index) => {
      const finite = values.map(parsed);
      path(finite, `line line-${index}`);
      finite.forEach((value, at) => {
        const point = points[at];
        const place = Number.isFinite(value) ? y(value) : top;
        if (index === 0 && (point.state === "out" || !Number.isFinite(value))) {
          const size = 5;
          const cx = x(point.x);
          svg.append(drawn("path", {
            d: `M${cx - size} ${place}L${cx} ${place - size}L${cx + size} ${place}L${cx} ${place + size}Z`,
            class: `mark ${point.state || "odd"}`,
          }));
        } else if (Number.isFinite(value) && points.length <= 130) {
          svg.append(drawn("circle", { cx: x(point.x), cy: place, r: point.state === "near" ? 3.6 : 2.4,
            class: `mark line-${index} ${index === 0 ? point.state || "" : ""}` }));
        }
      });
    });
    const worst = points.filter((point) => point.state === "out").sort((a, b) => parsed(b.used) - parsed(a.used))[0];
    if (worst && Number.isFinite(parsed(worst.value))) {
      const late = x(worst.x) > (left + right) / 2;
      svg.append(drawn("text", {
        x: x(worst.x) + (late ? -9 : 9), y: Math.max(y(parsed(worst.value)) + 4, top + 8), class: "named",
        "text-anchor": late ? "end" : "start",
      }, `${worst.numbered ? `${worst.x}: ` : ""}${number(worst.value)}${
        worst.baseline === undefined ? "" : `, baseline ${number(worst.baseline)}`}`));
    }
    // The pointer, or the arrow keys, choose a layer: its numbers stand below the plot, and a click opens it.
    const cursor = drawn("line", { y1: top, y2: bottom, class: "cursor", visibility: "hidden" });
    svg.append(cursor);
    let at = -1;
    const choose = (index) => {
      at = index;
      const place = x(points[index].x);
      made(cursor, { x1: place, x2: place, visibility: "visible" }, "");
      said(points[index]);
    };
    const leave = () => { at = -1; cursor.setAttribute("visibility", "hidden"); said(null); };
    const nearest = (event) => {
      const box = svg.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * width;
      return points.reduce((best, point, index) => (
        Math.abs(x(point.x) - place) < Math.abs(x(points[best].x) - place) ? index : best), 0);
    };
    svg.addEventListener("pointermove", (event) => choose(nearest(event)));
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("click", (event) => chosen(points[nearest(event)]));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) choose(Math.min(Math.max(at + step, 0), points.length - 1));
      else if (event.key === "Enter" && at >= 0) chosen(points[at]);
      else return;
      event.preventDefault();
    });
    return svg;
  };

  // The points of each kind, the kinds with findings first; kinds with equal numbers (q, k and v read one input) are one.
  const panelsOf = (table, points, lines) => {
    const kinds = new Map();
    points.forEach((point) => {
      const kind = table.rows[point.row].kind;
      kinds.set(kind, [...(kinds.get(kind) || []), point]);
    });
    const equal = new Map();
    kinds.forEach((members, kind) => {
      const numbers = members.map((point) => (table.rows[point.row].layer.match(/\d+/) || [NaN])[0]).map(Number);
      const numbered = numbers.every(Number.isFinite) && new Set(numbers).size === numbers.length;
      members.forEach((point, index) => Object.assign(point, { x: numbered ? numbers[index] : index, numbered }));
      const shown = (point) => [point.x, point.high, ...(lines ? Object.values(lines).map((values) => values[point.at]) : [point.value])];
      const key = members.length > 1 ? JSON.stringify(members.map(shown)) : String(kind);
      if (equal.has(key)) equal.get(key).names.push(table.kinds[kind]);
      else equal.set(key, { names: [table.kinds[kind]], points: members });
    });
    const badness = ({ points: members }) => members.filter((point) => point.state === "out").length * 1000
      + members.filter((point) => point.state === "near").length;
    return [...equal.values()].sort((a, b) => badness(b) - badness(a));
  };

  const lastPart = (names) => names.map((name, index) => (index ? name.split(".").pop() : name)).join(" = ");

  // Draw the panels into a figure, again whenever it becomes visible or changes its width.
  const draw = (figure, table, points, { lines, chosen }) => {
    const panels = panelsOf(table, points, lines);
    const readout = element("p", { class: "readout quiet", role: "status" });
    const say = (point) => {
      if (!point) { readout.textContent = "Point at a layer for its numbers; a click opens it."; return; }
      const more = lines ? Object.entries(lines).map(([name, values]) => `${name} ${number(values[point.at])}`).join(" · ")
        : `${number(point.value)} · ${words(point)}`;
      readout.textContent = `${table.rows[point.row].layer}: ${more}`;
    };
    say(null);
    const grid = element("div", { class: "panels" });
    const bad = panels.filter((each) => each.points.some((point) => point.state));
    const shown = (bad.length ? bad : panels).slice(0, MOST_PANELS);
    const rest = panels.filter((each) => !shown.includes(each));
    const slots = [];
    const slot = (each, where) => {
      const box = element("div", { class: "panel" });
      if (panels.length > 1) box.append(element("p", { class: "quiet caption" }, lastPart(each.names)));
      where.append(box);
      slots.push([each, box]);
    };
    shown.forEach((each) => slot(each, grid));
    if (lines && Object.keys(lines).length > 1) {
      const keys = element("p", { class: "keys" });
      Object.keys(lines).forEach((name, index) => keys.append(element("span", { class: `key-${index}` }, name)));
      figure.insertBefore(keys, figure.querySelector(".bars"));
    }
    const bars = figure.querySelector(".bars");
    figure.insertBefore(grid, bars);
    figure.insertBefore(readout, bars);
    if (rest.length) {
      const more = element("details", { class: "others" });
      more.append(element("summary", {}, `${rest.length} more ${rest.length === 1 ? "kind" : "kinds"} of layers`));
      const hidden = element("div", { class: "panels" });
      rest.forEach((each) => slot(each, hidden));
      more.append(hidden);
      figure.insertBefore(more, bars);
    }
    grid.classList.toggle("single", shown.length === 1);
    const paint = ([each, box]) => {
      const width = Math.floor(box.clientWidth);
      if (!width || box.painted === width) return;
      box.painted = width;
      const own = lines ? Object.fromEntries(Object.entries(lines).map(([name, values]) => [
        name, each.points.map((point) => values[point.at])])) : { value: each.points.map((point) => point.value) };
      const old = box.querySelector("svg");
      if (old) old.remove();
      box.append(panel(each.points, {
        width, height: width > 520 ? 250 : 190, lines: own, title: `By layer: ${lastPart(each.names)}`, said: say, chosen,
      }));
    };
    const watcher = new ResizeObserver(() => slots.forEach(paint));
    slots.forEach(([, box]) => watcher.observe(box));
  };
  return { element, drawn, number, share, words, draw };
})();
