// A click on a layer opens what is known of it: every assertion's number against its bound, and its distributions.
ready(() => {
  "use strict";
  const table = JSON.parse(document.getElementById("layer-data").textContent);
  const section = document.getElementById("layers");
  const rows = Array.from(section.querySelectorAll("tbody tr"));
  const { element, drawn, number } = qsa;

  const marks = (cells) => {
    const list = element("ul", { class: "marks" });
    cells.forEach((cell, index) => {
      if (!cell) return;
      const column = table.columns[index];
      const item = element("li");
      item.append(element("a", { href: `#${column.anchor}` }, column.id));
      if (column.subject) item.append(` on ${column.subject}`);
      const unit = Number(cell.value) === 1 ? column.unit.replace(/s$/, "") : column.unit;
      item.append(` ${number(cell.value)} ${unit} `);
      item.append(element("span", { class: cell.out ? "beyond-text" : cell.state ? "near-text" : "quiet" },
        (cell.out ? "◆ " : "") + qsa.words(cell)));
      list.append(item);
    });
    return list;
  };

  // Ticks at powers of two, short where they are far from 1: 2⁻¹² for 0.0002441.
  const raised = (exponent) => String(exponent).replace(/./g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] || "⁻");
  const power = (octave) => (octave < -6 || octave > 13 ? `2${raised(octave)}` : number(2 ** octave));

  // Bars on a logarithmic scale of counts over a logarithmic axis of magnitudes: outliers are few and far.
  // `others`: those of the reference or of the last release, drawn as lines; `baselines`: numbers on the same axis.
  const histogram = (data, thresholds, others, baselines) => {
    const [width, height, left, bottom, top] = [460, 170, 44, 34, 14];
    const perOctave = 4;
    const first = Math.min(data.first, ...others.map((other) => other.first)) - 1;
    const medianAt = Math.log2(Number(data.median)) * perOctave;
    const marksAt = [["median", medianAt]];
    thresholds.forEach((times) => marksAt.push([`${number(times)} × median`, medianAt + Math.log2(times) * perOctave]));
    const lastOf = (each) => each.first + each.counts.length + 1;
    const known = baselines.filter((value) => value > 0).map((value) => Math.log2(value) * perOctave);
    const shown = marksAt.filter(([, at]) => Number.isFinite(at) && at >= first);
    const last = Math.max(lastOf(data), ...others.map(lastOf), ...[...shown.map(([, at]) => at), ...known].map((at) => at + 1));
    const x = (at) => left + ((at - first) / (last - first)) * (width - left - 8);
    const decades = Math.max(1, Math.ceil(Math.log10(Math.max(...[data, ...others].flatMap((each) => each.counts), 1) + 1)));
    const y = (count) => height - bottom - (Math.log10(count + 1) / decades) * (height - bottom - top);
    const what = data.of === "tokens" ? "largest |x| of each token" : "|x| of each element";
    const label = `${data.subject ? `${data.subject}, ` : ""}${data.site}: ${what}; ${data.total.toLocaleString("en")} ${data.of}, `
      + `median ${number(data.median)}, largest ${number(data.largest)}`;
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "histogram" });
    for (let decade = 0; decade <= decades; decade += Math.ceil(decades / 4)) {
      const at = y(10 ** decade - 1);
      svg.append(drawn("line", { x1: left, x2: width - 8, y1: at, y2: at, class: "grid" }));
      const text = decade ? (decade > 3 ? `10${raised(decade)}` : String(10 ** decade)) : "0";
      svg.append(drawn("text", { x: left - 6, y: at + 3, "text-anchor": "end" }, text));
    }
    data.counts.forEach((count, index) => {
      if (!count) return;
      const from = x(data.first + index);
      const bar = drawn("rect", {
        x: from + 0.3, y: y(count), height: height - bottom - y(count), class: "bar-of",
        width: Math.max(x(data.first + index + 1) - from - 0.6, 0.6),
      });
      const edge = (at) => number(2 ** ((data.first + at) / perOctave));
      bar.append(drawn("title", {}, `${edge(index)} to ${edge(index + 1)}: ${count.toLocaleString("en")}`));
      svg.append(bar);
    });
    others.forEach((other) => {
      // Of another number of tokens: counts as if there were as many here.
      const scale = data.total / other.total;
      const steps = other.counts.map((count, index) => (
        `L${x(other.first + index).toFixed(1)} ${y(count * scale).toFixed(1)}H${x(other.first + index + 1).toFixed(1)}`)).join("");
      const line = drawn("path", { d: `M${x(other.first).toFixed(1)} ${y(0)}${steps}V${y(0)}`, class: "other" });
      line.append(drawn("title", {}, `${other.whose}: median ${number(other.median)}, largest ${number(other.largest)}`));
      svg.append(line);
    });
    known.forEach((at) => svg.append(drawn("line", { x1: x(at), x2: x(at), y1: top, y2: height - bottom, class: "baseline" })));
    const step = 2 ** Math.ceil(Math.log2(Math.max((last - first) / perOctave / 7, 1)));
    for (let octave = Math.ceil(first / perOctave / step) * step; octave * perOctave <= last; octave += step) {
      svg.append(drawn("text", { x: x(octave * perOctave), y: height - bottom + 14, "text-anchor": "middle" },
        power(octave)));
    }
    shown.forEach(([name, at], index) => {
      svg.append(drawn("line", { x1: x(at), x2: x(at), y1: top, y2: height - bottom, class: index ? "limit" : "middle" }));
      const late = x(at) > width - 90;
      svg.append(drawn("text", { x: x(at) + (late ? -3 : 3), y: top - 3, "text-anchor": late ? "end" : "start" }, name));
    });
    svg.append(drawn("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, what));
    const figure = element("figure");
    const small = data.zeros + data.below;
    const note = small ? `; ${small.toLocaleString("en")} are zero or below the axis` : "";
    const over = [...others.map((other) => (
      `line: the ${other.whose}, median ${number(other.median)}, largest ${number(other.largest)}`
    )), ...(known.length ? [`dashed: baseline ${baselines.map(number).join(", ")}`] : [])];
    figure.append(svg, element("p", { class: "quiet caption" }, [label + note, ...over].join("; ")));
    return figure;
  };

  const detail = (row, data) => {
    const made = element("tr", { class: "detail" });
    const cell = element("td", { colspan: row.cells.length });
    const box = element("div", { class: "opened" });
    box.append(marks(data.cells));
    const figures = element("div", { class: "figures" });
    data.histograms.filter((each) => !each.whose).forEach((each) => {
      const same = (other) => other.site === each.site && other.of === each.of && other.subject === each.subject;
      const others = data.histograms.filter((other) => other.whose && same(other) && other.counts.length);
      // The axis that a metric is on: that of a token's largest |x|, or of an element's |x|; no other means the same.
      const axes = { magnitude: each.site === "weight" ? "" : "tokens", rms: "elements", absmax: "elements" };
      // Baselines of |x| itself stand on its axis, where no other distribution does.
      const baselines = others.length ? [] : table.columns.flatMap((column, index) => (
        data.cells[index] && data.cells[index].baseline !== undefined && column.site === each.site && column.subject === each.subject
          && axes[column.metric] === each.of ? [Number(data.cells[index].baseline)] : []));
      const thresholds = table.columns.filter((column, index) => (
        data.cells[index] && column.threshold && column.site === each.site && each.of === "tokens"
      )).map((column) => Number(column.threshold));
      if (each.counts.length) figures.append(histogram(each, [...new Set(thresholds)], others, baselines));
    });
    if (!figures.children.length) {
      figures.append(element("p", { class: "quiet" },
        "No distribution of this layer is in the report: --qsa-report=always keeps one of every layer."));
    }
    box.append(figures);
    cell.append(box);
    made.append(cell);
    return made;
  };

  const open = (row, wanted) => {
    if (!row.detail) {
      row.detail = detail(row, table.rows[Number(row.dataset.row)]);
      row.after(row.detail);
    }
    row.detail.wanted = wanted;
    row.detail.hidden = !wanted;
    row.querySelector(".open").setAttribute("aria-expanded", String(wanted));
  };
  // A link to a layer, #layer=NAME, opens it; so does a click on a cell of a strip or on a point of a plot.
  const byIndex = new Map(rows.map((row) => [Number(row.dataset.row), row]));
  const show = (index) => {
    const row = byIndex.get(index);
    section.querySelector(".filter").value = "";
    section.querySelector(".only-out").checked = false;
    section.querySelector(".filter").dispatchEvent(new Event("input"));
    open(row, true);
    row.scrollIntoView({ block: "center" });
    row.querySelector(".open").focus({ preventScroll: true });
    history.replaceState(null, "", `#layer=${encodeURIComponent(table.rows[index].layer)}`);
  };
  rows.forEach((row) => row.addEventListener("click", (event) => {
    if (event.target.closest("a")) return;
    const wanted = !(row.detail && row.detail.wanted);
    open(row, wanted);
    if (wanted) history.replaceState(null, "", `#layer=${encodeURIComponent(table.rows[Number(row.dataset.row)].layer)}`);
  }));
  document.querySelectorAll(".strip i[data-row]").forEach((cell) => {
    cell.addEventListener("click", () => show(Number(cell.dataset.row)));
  });
  document.querySelectorAll(".plot[data-column]").forEach((figure) => {
    const column = Number(figure.dataset.column);
    const points = table.rows.map((row, index) => ({ ...row.cells[column], row: index })).filter((point) => (
      table.rows[point.row].cells[column]));
    qsa.draw(figure, table, points, { chosen: (point) => show(point.row) });
  });
  const indexOf = new Map(table.rows.map((row, index) => [row.layer, index]));
  document.querySelectorAll(".plot.lines").forEach((figure) => {
    const curve = JSON.parse(figure.querySelector("script").textContent);
    const points = curve.layers.map((layer, at) => ({ row: indexOf.get(layer), at })).filter((point) => point.row !== undefined);
    if (points.length) qsa.draw(figure, table, points, { lines: curve.lines, chosen: (point) => show(point.row) });
  });
  const followed = () => {
    const name = location.hash.startsWith("#layer=") ? decodeURIComponent(location.hash.slice(7)) : null;
    const index = name === null ? -1 : indexOf.has(name) ? indexOf.get(name) : -1;
    if (index >= 0) show(index);
  };
  addEventListener("hashchange", followed);
  followed();
});
