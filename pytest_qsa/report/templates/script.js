ready(() => {
  "use strict";
  const root = document.documentElement;
  const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));

  const toggle = document.getElementById("theme");
  const kept = () => { try { return localStorage.getItem("qsa-theme"); } catch { return null; } };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = (theme) => {
    root.dataset.theme = theme;
    toggle.textContent = theme === "dark" ? "Light" : "Dark";
  };
  paint(kept() || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", (event) => { if (!kept()) paint(event.matches ? "dark" : "light"); });
  toggle.addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("qsa-theme", theme); } catch { /* a page opened from disk may not store */ }
    paint(theme);
  });
  let before = null;
  addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; });
  addEventListener("afterprint", () => { if (before) root.dataset.theme = before; });

  const copied = async (text) => {
    try { await navigator.clipboard.writeText(text); return true; } catch { /* not allowed for a file on disk */ }
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    button.textContent = (await copied(button.dataset.copy)) ? "Copied" : "Select it";
    button.focus();
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }));

  // A link to an assertion that is folded opens it.
  const unfold = () => {
    const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    if (target && target.matches("details")) { target.hidden = false; target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", unfold);
  unfold();

  const search = document.getElementById("search");
  const chips = all(".chip");
  const choose = () => {
    const kind = chips.find((chip) => chip.getAttribute("aria-pressed") === "true").dataset.kind;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const cards = all(".card");
    cards.forEach((card) => {
      card.hidden = (kind && card.dataset.kind !== kind) || !words.every((word) => card.dataset.text.includes(word));
    });
    document.getElementById("none").hidden = cards.some((card) => !card.hidden);
  };
  chips.forEach((chip) => chip.addEventListener("click", () => {
    chips.forEach((other) => other.setAttribute("aria-pressed", String(other === chip)));
    choose();
  }));
  if (search) search.addEventListener("input", choose);

  const compare = (a, b) => {
    const [left, right] = [a, b].map((text) => (text === "" ? NaN : Number(text.replace("inf", "Infinity"))));
    if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right);
    return left - right;
  };
  all(".layers").forEach((layers) => {
    const body = layers.querySelector("tbody");
    const rows = Array.from(body.rows);
    const heads = all("thead th", layers);
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      // Numbers start with the largest, names with the first.
      const was = head.getAttribute("aria-sort");
      const up = was ? was === "descending" : column === 0;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const of = (row) => row.cells[column].dataset.v;
      const known = (row) => !Number.isNaN(Number(of(row).replace("inf", "Infinity"))) && of(row) !== "";
      const sorted = rows.slice().sort((a, b) => (
        known(a) && known(b) && !up ? compare(of(b), of(a)) : compare(of(a), of(b))
      ));
      body.append(...sorted.flatMap((row) => (row.detail ? [row, row.detail] : [row])));
    }));
    const filter = layers.querySelector(".filter");
    if (!filter) return;
    const only = layers.querySelector(".only-out");
    const shown = layers.querySelector(".shown");
    const sift = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row) => {
        const name = row.cells[0].textContent.toLowerCase();
        row.hidden = (only.checked && !row.matches(".out, .moved")) || !words.every((word) => name.includes(word));
        if (row.detail) row.detail.hidden = row.hidden || !row.detail.wanted;
      });
      const count = rows.filter((row) => !row.hidden).length;
      shown.textContent = count === rows.length ? "" : `${count} of ${rows.length}`;
    };
    filter.addEventListener("input", sift);
    only.addEventListener("change", sift);
  });
});
