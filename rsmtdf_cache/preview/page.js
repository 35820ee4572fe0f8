"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const colors = bytes(data.magma);
  const arrays = data.arrays.map((a) => {
    const codes = new Int8Array(bytes(a.codes).buffer);
    const count = codes.length / a.dimensions;
    const lengths = new Float32Array(count);
    for (let t = 0; t < count; t++) {
      let sum = 0;
      for (let k = t * a.dimensions; k < (t + 1) * a.dimensions; k++) sum += codes[k] * codes[k];
      lengths[t] = Math.sqrt(sum);
    }
    return { ...a, codes, lengths, norms: new Float32Array(bytes(a.norms).buffer), cosines: new Float32Array(count) };
  });
  const side = data.tile_px;
  const finest = Math.min(...arrays.map((a) => a.stride));
  const [readout, fixed, size] = ["readout", "fixed", "size"].map((id) => document.getElementById(id));
  let chosen = { tile: data.patch[0], y: data.patch[1], x: data.patch[2] };

  const nearest = (a, y, x) =>
    [y, x].map((p, d) => Math.min(Math.max(Math.floor((p - a.first[d]) / a.stride + 0.5), 0), a.grid[d] - 1));
  const centre = (a, i, j) => [a.first[0] + i * a.stride, a.first[1] + j * a.stride];
  const index = (a, tile, i, j) => (tile * a.grid[0] + i) * a.grid[1] + j;

  function compare(a, query) {
    const K = a.dimensions, start = query * K;
    for (let t = 0; t < a.lengths.length; t++) {
      let dot = 0;
      for (let k = 0; k < K; k++) dot += a.codes[start + k] * a.codes[t * K + k];
      a.cosines[t] = dot / (a.lengths[query] * a.lengths[t]); // NaN where a token has no direction
    }
    const known = a.cosines.filter(Number.isFinite).sort();
    a.low = fixed.checked ? 0 : known.length ? Math.min(known[Math.floor(0.02 * (known.length - 1))], 0.99) : 0;
  }

  function paint(canvas, a, tile) {
    const [height, width] = a.grid, context = canvas.getContext("2d"), picture = context.createImageData(width, height);
    for (let t = 0; t < height * width; t++) {
      const cosine = a.cosines[tile * height * width + t];
      const place = Math.round(Math.min(Math.max((cosine - a.low) / (1 - a.low), 0), 1) * 255);
      for (let c = 0; c < 3; c++) picture.data[4 * t + c] = Number.isFinite(cosine) ? colors[3 * place + c] : 128;
      picture.data[4 * t + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
  }

  function put(mark, y, x, stride) {
    mark.style.top = `${(100 * y) / side}%`;
    mark.style.left = `${(100 * x) / side}%`;
    mark.style.width = mark.style.height = `${(100 * stride) / side}%`;
    mark.hidden = false;
  }

  const cards = [...document.querySelectorAll(".card")].map((card) => {
    const tile = Number(card.dataset.tile), a = arrays[Number(card.dataset.array)];
    const still = card.querySelector("[data-kind=cosine] img"), canvas = document.createElement("canvas");
    [canvas.height, canvas.width] = a.grid;
    canvas.style.cssText = still.style.cssText;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", still.alt);
    still.replaceWith(canvas);
    const best = document.createElement("i");
    best.className = "mark best";
    canvas.parentElement.append(best);
    return { card, tile, a, canvas, best, value: card.querySelector(".value"), marks: card.querySelectorAll(".mark:not(.best)") };
  });
  const images = [...document.querySelectorAll(".tile .pic")].map((pic) => (
    { pic, tile: Number(pic.dataset.tile), mark: pic.querySelector(".mark") }));

  function say(c, i, j) {
    const t = index(c.a, c.tile, i, j), cosine = c.a.cosines[t], norm = c.a.norms[t];
    c.value.textContent = Number.isFinite(norm) ? `cosine ${cosine.toFixed(2)} · norm ${norm.toPrecision(3)}` : "no features";
  }

  function draw() {
    for (const a of arrays) compare(a, index(a, chosen.tile, ...nearest(a, chosen.y, chosen.x)));
    for (const { tile, mark } of images) {
      if (tile === chosen.tile) put(mark, chosen.y, chosen.x, finest);
      else mark.hidden = true;
    }
    for (const c of cards) {
      const { a, tile } = c, [i, j] = nearest(a, chosen.y, chosen.x), own = tile === chosen.tile;
      paint(c.canvas, a, tile);
      for (const mark of c.marks) {
        if (own) put(mark, ...centre(a, i, j), a.stride);
        else mark.hidden = true;
      }
      const first = index(a, tile, 0, 0), query = own ? index(a, tile, i, j) : -1;
      let top = -1;
      for (let t = first; t < first + a.grid[0] * a.grid[1]; t++) {
        if (t !== query && Number.isFinite(a.cosines[t]) && (top < 0 || a.cosines[t] > a.cosines[top])) top = t;
      }
      c.best.hidden = top < 0;
      if (top >= 0) put(c.best, ...centre(a, Math.floor((top - first) / a.grid[1]), (top - first) % a.grid[1]), a.stride);
      c.value.textContent = c.summary = top < 0 ? "no cosine" : `most alike ${a.cosines[top].toFixed(2)}`;
    }
    const { tile, y, x } = chosen;
    readout.textContent = `Patch at row ${Math.floor(y)}, column ${Math.floor(x)} of tile ${data.tiles[tile]}`;
  }

  function choose(tile, y, x) {
    chosen = { tile, y: Math.min(Math.max(y, 0), side - 1), x: Math.min(Math.max(x, 0), side - 1) };
    draw();
  }

  const point = (pic, event) => {
    const box = pic.getBoundingClientRect();
    return [((event.clientY - box.top) / box.height) * side, ((event.clientX - box.left) / box.width) * side];
  };
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  function steer(element, tile, move) {
    element.tabIndex = 0;
    element.addEventListener("keydown", (event) => {
      const step = arrows[event.key];
      if (!step && event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      move(step && tile === chosen.tile ? step : [0, 0]); // the first key in another tile goes there
    });
  }

  for (const c of cards) {
    const { a, tile } = c, pics = c.card.querySelector(".pics");
    const go = (y, x, step = [0, 0]) => {
      const [i, j] = nearest(a, y, x);
      const [h, w] = a.grid;
      choose(tile, ...centre(a, Math.min(Math.max(i + step[0], 0), h - 1), Math.min(Math.max(j + step[1], 0), w - 1)));
    };
    steer(pics, tile, (step) => go(chosen.y, chosen.x, step));
    for (const pic of pics.children) {
      pic.addEventListener("click", (event) => go(...point(pic, event)));
      pic.addEventListener("pointermove", (event) => say(c, ...nearest(a, ...point(pic, event))));
      pic.addEventListener("pointerleave", () => (c.value.textContent = c.summary));
    }
  }
  for (const { pic, tile } of images) {
    pic.addEventListener("click", (event) => choose(tile, ...point(pic, event)));
    steer(pic, tile, (step) => choose(tile, chosen.y + step[0] * finest, chosen.x + step[1] * finest));
  }
  for (const box of document.querySelectorAll("input[data-array]")) {
    box.addEventListener("change", () => {
      for (const c of cards) if (c.card.dataset.array === box.dataset.array) c.card.hidden = !box.checked;
    });
  }
  fixed.addEventListener("change", draw);
  size.addEventListener("input", () => document.documentElement.style.setProperty("--card", `${size.value}px`));
  document.documentElement.classList.add("live");
  draw();
})();
