"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("live");

  for (const box of document.querySelectorAll("input[data-arm]")) {
    box.addEventListener("change", () => root.classList.toggle(`hide${box.dataset.arm}`, !box.checked));
  }

  const names = [...document.querySelectorAll(".legend [data-name]")].map((n) => n.dataset.name);
  const SVG = "http://www.w3.org/2000/svg";

  // Points of a path "Mx,yldx,dy dx,dy": the page's own lines, read back into values.
  function read(path, frame) {
    const [x0, x1, y0, y1, left, right, top, bottom] = frame;
    const [first, ...steps] = path.getAttribute("d").slice(1).split(/[l ]/).map((p) => p.split(",").map(parseFloat));
    let [x, y] = first;
    const points = [[x, y]];
    for (const [dx, dy] of steps) if (Number.isFinite(dy)) points.push([(x += dx), (y += dy)]);
    return points.map(([a, b]) => ({
      px: a, step: x0 + ((a - left) / (right - left)) * (x1 - x0), value: y0 + ((bottom - b) / (bottom - top)) * (y1 - y0) }));
  }

  for (const svg of document.querySelectorAll(".plots figure > svg")) {
    const frame = svg.dataset.frame.split(" ").map(Number);
    let lines = null, tip = null, cursor = null;
    const leave = () => {
      for (const part of [tip, cursor]) if (part) part.remove();
      tip = cursor = null;
    };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      lines ??= [...svg.querySelectorAll(".mean")].map((path) => (
        { arm: Number(path.classList[1].slice(1)), points: read(path, frame) }));
      leave();
      if (x < frame[4] || x > frame[5]) return;
      const step = frame[0] + ((x - frame[4]) / (frame[5] - frame[4])) * (frame[1] - frame[0]);
      tip = document.createElement("div");
      tip.className = "tip";
      const head = document.createElement("div");
      head.textContent = `step ${Math.round(step)}`;
      tip.append(head);
      const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(frame[3] - frame[2]) || 1)));
      for (const { arm, points } of lines) {
        if (root.classList.contains(`hide${arm}`)) continue;
        const near = points.reduce((a, b) => (Math.abs(b.px - x) < Math.abs(a.px - x) ? b : a));
        const row = document.createElement("div"), key = document.querySelector(`.legend .key.a${arm}`).cloneNode(true);
        row.append(key, `${near.value.toFixed(Math.min(digits, 8))}${svg.dataset.unit} ${names[arm]}`);
        tip.append(row);
      }
      svg.parentElement.append(tip);
      const at = event.clientX - box.left, beside = at + 14 + tip.offsetWidth > box.width ? at - 14 - tip.offsetWidth : at + 14;
      tip.style.top = `${box.top - svg.parentElement.getBoundingClientRect().top + 8}px`;
      tip.style.left = `${Math.max(0, beside)}px`;
      cursor = document.createElementNS(SVG, "path");
      cursor.setAttribute("class", "cursor");
      cursor.setAttribute("d", `M${x},${frame[6]}V${frame[7]}`);
      svg.append(cursor);
    });
  }

  for (const figure of document.querySelectorAll(".matrices figure")) {
    const readout = figure.querySelector(".readout");
    const say = (event) => {
      const cell = event.target.closest("td[title]");
      if (cell) readout.textContent = cell.title;
    };
    figure.addEventListener("pointerover", say);
    figure.addEventListener("click", say);
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.plotted:not([open])")];
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
})();
