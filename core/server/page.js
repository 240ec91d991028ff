// A mask to draw over the picture that controls: with a mouse, a finger, or the arrow keys, the space bar and + -.
window.upMask = (() => {
  const MOST = 1024, COLOUR = "rgba(255, 60, 60, 0.6)";
  let brush = 0.06, at = null, down = false, drawn = false, picture = null, given = "";
  const mask = document.createElement("canvas");

  const canvas = () => document.querySelector("#up-mask canvas");

  function show(url) {
    given = url || "";
    const box = document.querySelector("#up-mask .up-mask");
    if (!box) return; // shown once it is there
    box.hidden = !url;
    picture = null; drawn = false; at = null;
    if (!url) return;
    const image = new Image();
    image.onload = () => {
      const scale = Math.min(1, MOST / Math.max(image.naturalWidth, image.naturalHeight));
      mask.width = canvas().width = Math.max(1, Math.round(scale * image.naturalWidth));
      mask.height = canvas().height = Math.max(1, Math.round(scale * image.naturalHeight));
      picture = image;
      clear();
    };
    image.src = url;
  }

  function clear() {
    const pen = mask.getContext("2d");
    pen.clearRect(0, 0, mask.width, mask.height);
    drawn = false;
    redraw();
  }

  function radius() { return brush * Math.max(mask.width, mask.height); }

  function redraw() {
    if (!picture) return;
    const pen = canvas().getContext("2d");
    pen.drawImage(picture, 0, 0, mask.width, mask.height);
    pen.drawImage(mask, 0, 0);
    if (!at) return;
    pen.beginPath();
    pen.arc(at.x, at.y, radius(), 0, 7);
    pen.lineWidth = 2; pen.strokeStyle = "white"; pen.stroke();
    pen.setLineDash([4, 4]); pen.strokeStyle = "black"; pen.stroke(); pen.setLineDash([]);
  }

  function paint(from, to) {
    const pen = mask.getContext("2d");
    pen.lineCap = pen.lineJoin = "round"; pen.lineWidth = 2 * radius(); pen.strokeStyle = COLOUR;
    pen.beginPath(); pen.moveTo(from.x, from.y); pen.lineTo(to.x, to.y + 0.01); pen.stroke();
    drawn = true;
  }

  function place(event) {
    const box = canvas().getBoundingClientRect();
    return { x: (event.clientX - box.left) * mask.width / box.width,
             y: (event.clientY - box.top) * mask.height / box.height };
  }

  function key(event) {
    const step = 0.03 * Math.max(mask.width, mask.height);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const before = at || { x: mask.width / 2, y: mask.height / 2 };
    at = { ...before };
    if (moves[event.key]) {
      at.x = Math.min(mask.width, Math.max(0, at.x + moves[event.key][0]));
      at.y = Math.min(mask.height, Math.max(0, at.y + moves[event.key][1]));
      if (event.shiftKey) paint(before, at);
    } else if (event.key === " ") paint(at, at);
    else if (event.key === "+") brush = Math.min(0.3, brush * 1.25);
    else if (event.key === "-") brush = Math.max(0.01, brush / 1.25);
    else return;
    event.preventDefault();
    redraw();
  }

  function start(element) {
    const c = element.querySelector("canvas");
    c.addEventListener("pointerdown", (e) => { down = true; c.setPointerCapture(e.pointerId); at = place(e); paint(at, at); redraw(); });
    c.addEventListener("pointermove", (e) => { const to = place(e); if (down) paint(at, to); at = to; redraw(); });
    for (const name of ["pointerup", "pointercancel"]) c.addEventListener(name, () => { down = false; });
    c.addEventListener("pointerleave", () => { if (!down) { at = null; redraw(); } });
    c.addEventListener("blur", () => { at = null; redraw(); });
    c.addEventListener("keydown", key);
    element.querySelector("button").addEventListener("click", clear);
    show(given);
  }

  // White where it was painted, on black; empty where nothing was.
  function data() {
    if (!picture || !drawn) return "";
    const out = document.createElement("canvas");
    out.width = mask.width; out.height = mask.height;
    const pen = out.getContext("2d");
    pen.drawImage(mask, 0, 0);
    pen.globalCompositeOperation = "source-in"; pen.fillStyle = "white"; pen.fillRect(0, 0, out.width, out.height);
    const pixels = pen.getImageData(0, 0, out.width, out.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const level = pixels.data[i + 3] > 64 ? 255 : 0;
      pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = level; pixels.data[i + 3] = 255;
    }
    pen.globalCompositeOperation = "source-over";
    pen.putImageData(pixels, 0, 0);
    return out.toDataURL("image/png");
  }

  return { show, start, data };
})();

// What this window was doing, until it is closed.
window.upJob = { kept: () => sessionStorage.getItem("ultrapixel.job") || "" };
window.addEventListener("pagehide", () => {
  const shown = document.querySelector("#up-progress [data-job]");
  if (shown) sessionStorage.setItem("ultrapixel.job", shown.dataset.job);
});
