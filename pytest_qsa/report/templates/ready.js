// Scripts of the page run once all of it is there: the tables of very many layers are compressed, and are unpacked first.
const { ready, unpack } = (() => {
  "use strict";
  const waiting = [];
  const ready = (run) => waiting.push(run);
  const inflated = async (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const show = async (script) => {
    const text = await inflated(script.textContent);
    if (script.type === "application/json") script.textContent = text;
    else script.parentNode.innerHTML = text;
    script.removeAttribute("data-packed");
  };
  const unpack = () => {
    const packed = Array.from(document.querySelectorAll("script[data-packed]"));
    const start = () => waiting.forEach((run) => run());
    if (!packed.length) start();
    else if (typeof DecompressionStream === "undefined") {
      document.querySelector("header").append("This browser can't unpack the tables of so many layers: open the page in a newer one, or read report.json.");
    } else Promise.all(packed.map(show)).then(start);
  };
  return { ready, unpack };
})();
