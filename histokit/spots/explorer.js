// The explorer of slides and spots: an image pyramid and its spots on a canvas, the picked spot beside it.
// One module for three hosts: a notebook's kernel (anywidget), a local server, a page that holds everything.

const DRAG_PX = 4;             // a pointer that moved further pans and picks nothing
const IN_FLIGHT = 6;           // tiles asked for at a time
const KEPT_TILES = 300;
const TYPES_SHOWN = 12;
const MOST_MAGNIFIED = 16;     // screen pixels a slide pixel
const LENGTHS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];    // of scale bars, µm
const PICKED = "#00b000";

// ---------------------------------------------------------------- what is fetched, and from whom

const bytesOf = (raw) =>
  raw instanceof ArrayBuffer ? new Uint8Array(raw) : new Uint8Array(raw.buffer, raw.byteOffset, raw.byteLength).slice();

function unpack(raw) {
  // A slide's spots: a length, a line of JSON, and the arrays that it names, float32.
  const bytes = bytesOf(raw);
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  for (const [name, start, count] of head.arrays) head[name] = new Float32Array(bytes.buffer, start, count);
  return head;
}

export const servedHost = (base = "") => ({
  async get(...at) {
    const reply = await fetch(base + at.join("/"));
    if (!reply.ok) throw new Error(await reply.text());
    return reply.arrayBuffer();
  },
});

export const embeddedHost = (pieces) => ({
  async get(...at) {
    const text = pieces[at.join("/")];
    if (text === undefined) throw new Error(`this page does not hold ${at.join("/")}`);
    return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  },
});

function kernelHost(model) {
  const waiting = new Map();
  const view = Math.random().toString(36).slice(2);      // several views of one model ask the same kernel
  let count = 0;
  const heard = (content, buffers) => {
    const due = waiting.get(content.id);
    if (!due) return;
    waiting.delete(content.id);
    if (content.error) due.reject(new Error(content.error));
    else due.resolve(buffers[0]);
  };
  model.on("msg:custom", heard);
  return {
    get: (...at) => new Promise((resolve, reject) => {
      const id = `${view}-${count++}`;
      waiting.set(id, { resolve, reject });
      model.send({ id, get: at });
    }),
    close: () => model.off("msg:custom", heard),
  };
}

class Tiles {
  // Tiles by key, the latest kept; those wanted now are asked for, a few at a time.
  constructor(host, changed, failed) {
    Object.assign(this, { host, changed, failed, kept: new Map(), asked: new Set(), bad: new Set(), wanted: [] });
  }

  get(key) {
    const tile = this.kept.get(key);
    if (tile) { this.kept.delete(key); this.kept.set(key, tile); }
    return tile;
  }

  open() { return this.wanted.filter((k) => !this.kept.has(k) && !this.bad.has(k)); }

  want(keys) { this.wanted = keys; this.pump(); }

  pump() {
    const open = this.open().filter((k) => !this.asked.has(k));
    while (open.length && this.asked.size < IN_FLIGHT) this.load(open.shift());
  }

  async load(key) {
    this.asked.add(key);
    try {
      const [kind, ...at] = key.split("/");
      const raw = await this.host.get(kind, ...at.map(Number));
      this.kept.set(key, await createImageBitmap(new Blob([raw], { type: "image/jpeg" })));
      for (const old of this.kept.keys()) {
        if (this.kept.size <= KEPT_TILES) break;
        this.kept.get(old).close();
        this.kept.delete(old);
      }
    } catch (error) {
      this.bad.add(key);
      this.failed(error);
    }
    this.asked.delete(key);
    this.changed(key);
    this.pump();
  }
}

// ---------------------------------------------------------------- small things

const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const known = (v) => v !== undefined && !Number.isNaN(v);

function written(v) {
  if (!known(v)) return "–";
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size >= 1e5 || size < 1e-3) return v.toExponential(1);
  return String(Number(v.toPrecision(3)));
}

function make(tag, attrs = {}, ...inside) {
  const out = document.createElement(tag);
  for (const [name, value] of Object.entries(attrs)) {
    if (name.startsWith("on")) out.addEventListener(name.slice(2), value);
    else if (value !== false) out.setAttribute(name, value);
  }
  out.append(...inside);
  return out;
}

function palette(base64) {
  // 256 colours as CSS.
  const raw = atob(base64);
  const at = (i) => raw.charCodeAt(i);
  return Array.from({ length: raw.length / 3 }, (_, i) => `rgb(${at(3 * i)},${at(3 * i + 1)},${at(3 * i + 2)})`);
}

const place = ([low, high], v) => clamp((v - low) / (high - low), 0, 1);

function resize(canvas, width, height, dpr) {
  // Setting a canvas's size empties it; true where that was needed.
  const w = Math.max(Math.round(width * dpr), 1), h = Math.max(Math.round(height * dpr), 1);
  if (canvas.width === w && canvas.height === h) return false;
  canvas.width = w;
  canvas.height = h;
  return true;
}

// ---------------------------------------------------------------- a slide on a canvas

// A frame is what a canvas shows: its size w, h in device pixels, the slide's pixel (cx, cy) in its middle, and k
// device pixels a slide pixel. A spot's x = 0 is the centre of the first pixel, whose edge is at -0.5.

function paintSlide(ctx, frame, slide, number, tiles, tilePx) {
  // Draws what is here, coarser tiles where finer ones are missing; gives the keys of what is missing.
  const { w, h, cx, cy, k } = frame, missing = [];
  const level = clamp(Math.floor(Math.log2(1 / k) + 0.25), slide.finest, slide.levels - 1);
  const key = (l, row, col) => `tile/${number}/${l}/${row}/${col}`;
  const x = (edge) => Math.round((edge - 0.5 - cx) * k + w / 2);
  const y = (edge) => Math.round((edge - 0.5 - cy) * k + h / 2);
  const side = tilePx * 2 ** level;
  const span = (centre, size, n) => {
    const first = Math.floor((centre + 0.5 - size / 2 / k) / side);
    const last = Math.floor((centre + 0.5 + size / 2 / k) / side);
    return [Math.max(first, 0), Math.min(last, Math.ceil(n / side) - 1)];
  };
  const [r0, r1] = span(cy, h, slide.height), [c0, c1] = span(cx, w, slide.width);
  const put = (tile, l, row, col, up) => {
    // A tile of level l, or the part of it that lies under a tile `up` levels finer.
    const px = 2 ** l, part = tilePx / 2 ** up, mask = 2 ** up - 1;
    const sx = (col & mask) * part, sy = (row & mask) * part;
    const sw = Math.min(part, tile.width - sx), sh = Math.min(part, tile.height - sy);
    if (sw <= 0 || sh <= 0) return;
    const left = col * side, top = row * side;
    const x0 = x(left), y0 = y(top);
    ctx.drawImage(tile, sx, sy, sw, sh, x0, y0, x(left + sw * px) - x0, y(top + sh * px) - y0);
  };
  ctx.clearRect(0, 0, w, h);
  ctx.save();
  ctx.beginPath();
  ctx.rect(x(0), y(0), x(slide.width) - x(0), y(slide.height) - y(0));
  ctx.clip();
  ctx.imageSmoothingEnabled = k < 2;
  for (let row = r0; row <= r1; row++) for (let col = c0; col <= c1; col++) {
    const tile = tiles.get(key(level, row, col));
    if (tile) { put(tile, level, row, col, 0); continue; }
    missing.push(key(level, row, col));
    for (let up = 1; level + up < slide.levels; up++) {
      const coarse = tiles.get(key(level + up, row >> up, col >> up));
      if (!coarse) continue;
      put(coarse, level + up, row, col, up);
      break;
    }
  }
  ctx.restore();
  const top = key(slide.levels - 1, 0, 0);             // something to show while the finer ones come
  return missing.length && !tiles.get(top) ? [top, ...missing] : missing;
}

function circle(ctx, frame, x, y, radius) {
  ctx.beginPath();
  ctx.arc((x - frame.cx) * frame.k + frame.w / 2, (y - frame.cy) * frame.k + frame.h / 2, radius, 0, 2 * Math.PI);
}

function ring(ctx, frame, x, y, radius, colour, width) {
  for (const [style, line] of [["#fff", width + 2], [colour, width]]) {
    circle(ctx, frame, x, y, radius);
    Object.assign(ctx, { strokeStyle: style, lineWidth: line });
    ctx.stroke();
  }
}

// ---------------------------------------------------------------- a panel: a slide, its spots, marks, a colour bar

class Panel {
  constructor(explorer, position) {
    Object.assign(this, { explorer, position, dirty: {}, missing: [], pointers: new Map() });
    this.centre = { x: 0.5, y: 0.5 };
    const layer = (name) => [name, make("canvas", { class: `hk-${name}` })];
    this.canvases = Object.fromEntries(["tiles", "spots", "marks"].map(layer));
    this.scale = make("div", { class: "hk-scale" });
    const held = [...Object.values(this.canvases), this.scale];
    this.stage = make("div", { class: "hk-stage", tabindex: 0, role: "application" }, ...held);
    this.caption = make("figcaption");
    this.strip = make("canvas", { class: "hk-strip" });
    this.marker = make("span", { class: "hk-marker" });
    this.ticks = make("div", { class: "hk-ticks" });
    this.unit = make("div", { class: "hk-unit" });
    this.bar = make("div", { class: "hk-bar" }, this.strip, this.marker, this.ticks, this.unit);
    this.root = make("figure", { class: "hk-panel" }, this.caption, this.stage, this.bar);
    this.listen();
  }

  get number() {
    const { slide, beside } = this.explorer.view;
    return this.explorer.slideNumber(this.position ? beside : slide);
  }
  get slide() { return this.explorer.facts.slides[this.number]; }
  get data() { return this.explorer.data[this.number]; }
  get kind() {
    const { kind, beside_kind } = this.explorer.view;
    return this.position && beside_kind ? beside_kind : kind;
  }
  get colouring() { return this.explorer.facts.kinds[this.kind]; }
  get limits() {
    const { limits } = this.colouring;
    return limits[Math.min(this.explorer.view.target, limits.length - 1)];
  }

  values() { return this.explorer.values(this.number, this.kind); }

  middle() {
    // The centre as shares of width and height; the same slide twice moves as one.
    const { view } = this.explorer;
    return this.position && this.slide.name !== view.slide ? this.centre : view;
  }

  frame() {
    const dpr = window.devicePixelRatio || 1, { x, y } = this.middle(), { slide } = this;
    const w = this.canvases.tiles.width, h = this.canvases.tiles.height;
    return { w, h, dpr, cx: x * slide.width - 0.5, cy: y * slide.height - 0.5, k: this.explorer.scale(this) * dpr };
  }

  corner() {
    // The upper left of the picture, inside its border, on the page.
    const box = this.stage.getBoundingClientRect();
    return [box.left + this.stage.clientLeft, box.top + this.stage.clientTop];
  }

  toSlide(event) {
    const [left, top] = this.corner(), { w, h, cx, cy, k, dpr } = this.frame();
    return [((event.clientX - left) * dpr - w / 2) / k + cx, ((event.clientY - top) * dpr - h / 2) / k + cy];
  }

  toScreen(x, y) {
    const [left, top] = this.corner(), { w, h, cx, cy, k, dpr } = this.frame();
    return [left + ((x - cx) * k + w / 2) / dpr, top + ((y - cy) * k + h / 2) / dpr];
  }

  middleOfStage() {
    // Where a pointer would be in the middle of the picture.
    const [left, top] = this.corner();
    return { clientX: left + this.stage.clientWidth / 2, clientY: top + this.stage.clientHeight / 2 };
  }

  // The spot nearest to a place, if it is no further away than so many CSS pixels or diameters; else -1.
  nearest([x, y], pixels, diameters) {
    if (!this.data) return -1;
    const { xy } = this.data, furthest = Math.max(pixels / this.explorer.scale(this), diameters * this.slide.spot_px);
    let best = -1, least = furthest ** 2;
    for (let i = 0; i < xy.length / 2; i++) {
      const d = (xy[2 * i] - x) ** 2 + (xy[2 * i + 1] - y) ** 2;
      if (d <= least) { best = i; least = d; }
    }
    return best;
  }

  // ------------------------------------------------------------ the pointer

  listen() {
    const on = (name, handle, options) => this.stage.addEventListener(name, handle, options);
    on("pointerdown", (e) => this.down(e));
    on("pointermove", (e) => this.move(e));
    on("pointerup", (e) => this.up(e));
    on("pointercancel", (e) => this.pointers.delete(e.pointerId));
    on("pointerleave", () => this.explorer.hover(this, -1));
    on("wheel", (e) => this.wheel(e), { passive: false });
    on("keydown", (e) => this.explorer.pressed(e, this));
  }

  down(e) {
    if (e.button) return;
    this.stage.setPointerCapture(e.pointerId);
    this.stage.focus({ preventScroll: true });
    if (!this.pointers.size) this.dragged = false;
    this.pointers.set(e.pointerId, { x: e.clientX, y: e.clientY, x0: e.clientX, y0: e.clientY });
    if (this.pointers.size > 1) this.dragged = true;
  }

  move(e) {
    const held = this.pointers.get(e.pointerId);
    if (!held) return this.explorer.hover(this, this.nearest(this.toSlide(e), 6, 0.5), e);
    if (Math.hypot(e.clientX - held.x0, e.clientY - held.y0) > DRAG_PX) this.dragged = true;
    if (!this.dragged) return undefined;
    const others = [...this.pointers.entries()].filter(([id]) => id !== e.pointerId).map(([, p]) => p);
    const before = [held.x, held.y], after = [e.clientX, e.clientY];
    Object.assign(held, { x: e.clientX, y: e.clientY });
    this.explorer.hover(this, -1);
    if (others.length) return this.pinch(others[0], before, after);
    const k = this.explorer.scale(this), { x, y } = this.middle();
    const dx = (after[0] - before[0]) / k / this.slide.width, dy = (after[1] - before[1]) / k / this.slide.height;
    return this.explorer.centre(this, x - dx, y - dy);
  }

  pinch(other, before, after) {
    const apart = ([x, y]) => Math.max(Math.hypot(x - other.x, y - other.y), 1);
    this.explorer.zoomAt(this, { clientX: other.x, clientY: other.y }, apart(after) / apart(before));
  }

  up(e) {
    if (!this.pointers.delete(e.pointerId) || this.dragged) return;
    const spot = this.nearest(this.toSlide(e), 20, 2);
    if (spot >= 0) this.explorer.pick(this.slide.name, spot);
  }

  wheel(e) {
    e.preventDefault();
    e.stopPropagation();
    const lines = [1, 16, 400][e.deltaMode] || 1;
    this.explorer.zoomAt(this, e, Math.exp(-clamp(e.deltaY * lines, -300, 300) * 0.002));
  }

  // ------------------------------------------------------------ drawing

  fit(dpr) {
    const { clientWidth, clientHeight } = this.stage;
    const changed = Object.values(this.canvases).filter((c) => resize(c, clientWidth, clientHeight, dpr));
    if (changed.length) this.touch("tiles", "spots", "marks");
    if (resize(this.strip, this.bar.clientWidth, 34, dpr)) this.touch("bar");
  }

  touch(...layers) { for (const layer of layers) this.dirty[layer] = true; }

  draw(counts) {
    for (const layer of ["tiles", "spots", "marks", "bar", "caption"]) {
      if (!this.dirty[layer]) continue;
      this.dirty[layer] = false;
      counts[layer] = (counts[layer] || 0) + 1;
      this[`draw_${layer}`]();
    }
  }

  draw_tiles() {
    const { explorer } = this, ctx = this.canvases.tiles.getContext("2d");
    this.missing = paintSlide(ctx, this.frame(), this.slide, this.number, explorer.tiles, explorer.facts.tile_px);
    this.draw_scale();
  }

  draw_scale() {
    const { um } = this.slide;
    this.scale.style.display = um ? "" : "none";
    if (!um) return;
    const umPerPx = um / this.explorer.scale(this), room = umPerPx * Math.min(this.stage.clientWidth / 4, 120);
    const nice = LENGTHS.filter((v) => v <= room).pop() || 1;
    this.scale.textContent = nice < 1000 ? `${nice} µm` : `${nice / 1000} mm`;
    this.scale.style.width = `${nice / umPerPx}px`;
  }

  radius(frame) { return Math.max(this.slide.spot_px / 2 * frame.k, 1.5 * frame.dpr); }

  draw_spots() {
    const ctx = this.canvases.spots.getContext("2d"), frame = this.frame(), { w, h, cx, cy, k } = frame;
    ctx.clearRect(0, 0, w, h);
    if (!this.data) return;
    const { xy } = this.data, values = this.values(), colours = this.explorer.palettes[this.colouring.palette];
    const { limits } = this, radius = this.radius(frame);
    Object.assign(ctx, { strokeStyle: "#444", lineWidth: frame.dpr });
    for (let i = 0; i < xy.length / 2; i++) {
      const sx = (xy[2 * i] - cx) * k + w / 2, sy = (xy[2 * i + 1] - cy) * k + h / 2;
      if (sx < -radius || sy < -radius || sx > w + radius || sy > h + radius) continue;
      circle(ctx, frame, xy[2 * i], xy[2 * i + 1], radius);
      const v = values ? values(i) : NaN;
      if (!known(v)) { ctx.stroke(); continue; }
      ctx.fillStyle = colours[Math.round(255 * place(limits, v))];
      ctx.fill();
    }
  }

  draw_marks() {
    const ctx = this.canvases.marks.getContext("2d"), frame = this.frame(), { explorer } = this;
    ctx.clearRect(0, 0, frame.w, frame.h);
    if (!this.data) return;
    const { xy } = this.data, radius = this.radius(frame);
    const mark = (i, colour, width) =>
      ring(ctx, frame, xy[2 * i], xy[2 * i + 1], radius + (width + 1) * frame.dpr, colour, width * frame.dpr);
    const { hovered } = explorer;
    if (hovered && hovered.slide === this.slide.name) mark(hovered.spot, "#222", 1);
    if (explorer.picked === this.slide.name) mark(explorer.view.spot, PICKED, 2.5);
    this.place_marker();
  }

  place_marker() {
    // Where the picked spot's value lies on the colour bar.
    const mine = this.explorer.picked === this.slide.name, values = mine && this.values();
    const v = values ? values(this.explorer.view.spot) : NaN;
    this.marker.style.display = known(v) ? "" : "none";
    if (known(v)) this.marker.style.left = `${100 * place(this.limits, v)}%`;
  }

  draw_bar() {
    // A histogram of the slide's values over the colours that stand for them.
    const values = this.data && this.values(), { limits } = this;
    const bins = new Array(Math.max(Math.round(this.bar.clientWidth / 6), 8)).fill(0);
    const n = values ? this.data.xy.length / 2 : 0;
    for (let i = 0; i < n; i++) {
      const v = values(i);
      if (known(v)) bins[Math.min(Math.floor(place(limits, v) * bins.length), bins.length - 1)]++;
    }
    this.draw_bins(bins);
    this.write_ticks();
    this.place_marker();
  }

  draw_bins(bins) {
    const ctx = this.strip.getContext("2d"), { width, height } = this.strip;
    const colours = this.explorer.palettes[this.colouring.palette];
    const most = Math.max(...bins, 1), step = width / bins.length, floor = height * 0.68;
    ctx.clearRect(0, 0, width, height);
    bins.forEach((count, i) => {
      ctx.fillStyle = colours[Math.round(255 * (i + 0.5) / bins.length)];
      const tall = count && Math.max(floor * 0.96 * count / most, 1);
      ctx.fillRect(i * step, floor - tall, step - 1, tall);
      ctx.fillRect(i * step, floor + 2, step + 0.5, height - floor - 2);
    });
  }

  write_ticks() {
    const { log, unit, clipped, limits: all } = this.colouring, [low, high] = this.limits;
    const words = [low, (low + high) / 2, high].map((v) => written(log ? 10 ** v : v));
    if (clipped) { words[0] = `≤${words[0]}`; words[2] = `≥${words[2]}`; }
    this.ticks.replaceChildren(...words.map((t) => make("span", {}, t)));
    const type = all.length > 1 ? `${this.explorer.facts.types[this.explorer.view.target]}: ` : "";
    this.unit.textContent = `${type}${unit}${log ? ", log scale" : ""}`;
  }

  draw_caption() {
    const { slide, colouring } = this, there = !this.data || this.values();
    const what = `${colouring.label}${there ? "" : ": not known here"}`;
    this.caption.textContent = `${slide.name} (${slide.split.toLowerCase()}), ${what}`;
    const words = `${slide.name}: ${slide.spots} spots coloured by ${colouring.label}; arrow keys step through them`;
    this.stage.setAttribute("aria-label", words);
  }
}

// ---------------------------------------------------------------- the whole

const HELP = "The wheel zooms, a drag moves, a click picks a spot; arrow keys step, with Shift to the neighbour there.";
const WHOLE = { zoom: 1, x: 0.5, y: 0.5 };

class Explorer {
  constructor(root, host, facts, view, changed) {
    Object.assign(this, { root, host, facts, changed, data: {}, counts: {}, hovered: null, loading: 0, drawn: {} });
    this.palettes = Object.fromEntries(Object.entries(facts.palettes).map(([n, p]) => [n, palette(p)]));
    this.tiles = new Tiles(host, (key) => this.arrived(key), (error) => this.say(error.message));
    this.view = { ...view };
    this.panels = [new Panel(this, 0), new Panel(this, 1)];
    this.build();
    this.sized = new ResizeObserver(() => this.relayout());
    for (const p of this.panels) this.sized.observe(p.stage);
    this.set(view, true);
    this.everything();
  }

  close() {
    this.sized.disconnect();
    cancelAnimationFrame(this.due);
    clearTimeout(this.notice);
    if (this.host.close) this.host.close();
    this.root.replaceChildren();
  }

  // ------------------------------------------------------------ the controls

  build() {
    this.controls = {};
    this.pair = make("div", { class: "hk-pair" }, ...this.panels.map((p) => p.root));
    this.status = make("div", { class: "hk-status", role: "status" }, [HELP, ...this.facts.notes].join(" "));
    this.tip = make("div", { class: "hk-tip" });
    this.root.classList.add("hk-explorer");
    this.root.setAttribute("data-lm-suppress-shortcuts", "true");       // JupyterLab leaves the keys to us
    const controls = make("div", { class: "hk-controls" });
    controls.append(...this.build_menus(), this.build_opacity(), this.build_zoom());
    const left = make("div", { class: "hk-left" }, this.pair, this.build_step());
    const main = make("div", { class: "hk-main" }, left, this.build_side());
    this.root.replaceChildren(controls, main, this.status, this.tip);
  }

  build_menu(label, name, pairs, parse = (v) => v) {
    const options = pairs.map(([value, text]) => make("option", { value }, text));
    const onchange = () => this.set({ [name]: parse(select.value) });
    const select = make("select", { "aria-label": label, onchange }, ...options);
    this.controls[name] = select;
    return make("label", {}, make("span", {}, label), select);
  }

  build_slider(name, attrs) {
    const oninput = () => this.set({ [name]: Number(input.value) });
    const input = make("input", { type: "range", "aria-label": name, ...attrs, oninput });
    this.controls[name] = input;
    return input;
  }

  build_menus() {
    const { facts } = this, names = facts.slides.map((s) => [s.name, s.name]);
    const kinds = Object.entries(facts.kinds).map(([kind, c]) => [kind, c.label]);
    const menus = [
      this.build_menu("slide", "slide", names),
      this.build_menu("coloured by", "kind", kinds),
      this.build_menu("cell type", "target", facts.types.map((t, i) => [i, t]), Number),
      this.build_menu("beside it", "beside", [["", "nothing"], ...names]),
    ];
    this.second = this.build_menu("coloured by", "beside_kind", [["", "the same"], ...kinds]);
    this.controls.beside_kind.setAttribute("aria-label", "beside it, coloured by");
    return [...menus, this.second];
  }

  build_opacity() {
    return make("label", {}, make("span", {}, "opacity"), this.build_slider("opacity", { min: 0, max: 1, step: 0.05 }));
  }

  build_zoom() {
    const button = (text, label, onclick) =>
      make("button", { type: "button", title: label, "aria-label": label, onclick }, text);
    const [first] = this.panels, by = (factor) => () => this.zoomAt(first, first.middleOfStage(), factor);
    return make("div", { class: "hk-buttons" }, button("−", "zoom out", by(0.5)), button("+", "zoom in", by(2)),
      button("⤢", "the whole slide", () => this.whole()));
  }

  build_step() {
    const onchange = () => {
      if (this.typed.value !== "") this.set({ spot: Math.round(Number(this.typed.value)) });
      this.controls_from_view();
    };
    this.typed = make("input", { type: "number", min: 0, "aria-label": "number of the spot", onchange });
    this.total = make("span", { class: "hk-dim" });
    const slider = this.build_slider("spot", { min: 0, max: 0, step: 1 });
    return make("div", { class: "hk-step" }, make("span", {}, "spot"), slider, this.typed, this.total);
  }

  build_side() {
    this.facts_of_spot = make("dl", { class: "hk-facts" });
    this.patches = this.build_patches();
    this.bars = make("div", { class: "hk-bars" });
    const swatch = (css) => make("i", { class: css }), unit = make("span", { class: "hk-dim" }, "abundance, log scale");
    this.legend = make("div", { class: "hk-legend" }, swatch("hk-t"), "truth", swatch("hk-p"), "prediction", unit);
    const patches = make("div", { class: "hk-patches" }, ...this.patches.map((p) => p.root));
    return make("div", { class: "hk-side" }, this.facts_of_spot, patches, this.legend, this.bars);
  }

  build_patches() {
    return [0, 1, 2].map(() => {
      const canvas = make("canvas"), caption = make("figcaption");
      return { canvas, caption, missing: [], root: make("figure", {}, canvas, caption) };
    });
  }

  controls_from_view() {
    const { view, controls } = this, slide = this.facts.slides[this.slideNumber(this.picked)];
    const twice = this.facts.kinds.prediction !== undefined;            // a slide may stand beside itself
    for (const option of controls.beside.options) option.hidden = option.value === view.slide && !twice;
    controls.spot.max = this.typed.max = slide.spots - 1;
    for (const [name, control] of Object.entries(controls)) {
      if (control.value !== String(view[name])) control.value = view[name];
    }
    if (this.typed.value !== String(view.spot)) this.typed.value = view.spot;
    this.total.textContent = `of ${slide.spots}${this.picked === view.slide ? "" : ` on ${this.picked}`}`;
    this.second.style.display = view.beside ? "" : "none";
    const kinds = [view.kind, view.beside && view.beside_kind].filter(Boolean);
    controls.target.disabled = kinds.every((kind) => this.facts.kinds[kind].limits.length < 2);
  }

  // ------------------------------------------------------------ what is looked at

  slideNumber(name) { return this.facts.slides.findIndex((s) => s.name === name); }
  get picked() { return this.view.spot_of || this.view.slide; }
  get shown() { return this.panels.slice(0, this.view.beside ? 2 : 1); }

  settle(view) {
    // A view that can be drawn: what another slide or no second slide makes meaningless is put right.
    const out = { ...view }, kinds = Object.keys(this.facts.kinds);
    if (this.slideNumber(out.slide) < 0) out.slide = this.facts.slides[0].name;
    if (this.slideNumber(out.beside) < 0) out.beside = "";
    if (out.beside === out.slide && (!out.beside_kind || out.beside_kind === out.kind)) {
      const other = out.kind === "prediction" ? "truth" : "prediction";
      if (kinds.includes(other)) out.beside_kind = other;
      else out.beside = "";
    }
    if (out.spot_of !== out.beside || out.spot_of === out.slide) out.spot_of = "";
    const n = this.facts.slides[this.slideNumber(out.spot_of || out.slide)].spots;
    out.spot = clamp(out.spot | 0, 0, Math.max(n - 1, 0));
    return out;
  }

  set(changes, quiet = false) {
    const before = this.view, other = (name) => !quiet && name in changes && changes[name] !== before[name];
    if (other("slide")) changes = { spot: 0, spot_of: "", ...WHOLE, ...changes };
    if (other("beside")) changes = { ...WHOLE, ...changes };
    const view = this.view = this.settle({ ...before, ...changes });
    const differs = (...names) => names.some((n) => view[n] !== before[n]);
    if (differs("slide", "beside")) this.everything();
    if (differs("kind", "beside_kind", "target")) this.touch("spots", "bar", "caption");
    if (differs("spot", "spot_of", "slide")) { this.touch("marks"); this.drawn.side = false; }
    if (differs("target")) this.drawn.side = false;
    if (differs("zoom", "x", "y")) this.touch("tiles", "spots", "marks");
    this.root.style.setProperty("--hk-opacity", view.opacity);
    this.controls_from_view();
    this.schedule();
    if (!quiet) this.tell();
  }

  tell() {
    // A moment later, so that a drag is one message.
    clearTimeout(this.notice);
    this.notice = setTimeout(() => this.changed(this.view), 150);
  }

  everything() {
    this.panels[1].root.style.display = this.view.beside ? "" : "none";
    this.touch("tiles", "spots", "marks", "bar", "caption");
    this.drawn.side = false;
    this.tiles.bad.clear();                            // what failed is tried once more
    for (const p of this.shown) this.load(p.number);
    this.schedule();
  }

  touch(...layers) { for (const p of this.panels) p.touch(...layers); }

  async load(number) {
    if (number in this.data) return;
    this.data[number] = undefined;
    this.loading++;
    try { this.data[number] = unpack(await this.host.get("slide", number)); }
    catch (error) {
      delete this.data[number];                        // asked for again when a slide is chosen
      this.say(error.message);
    }
    this.loading--;
    for (const p of this.panels) if (p.number === number) p.touch("spots", "marks", "bar", "caption");
    this.drawn.side = false;
    this.schedule();
  }

  values(number, kind) {
    // A function from a spot to what it is coloured by, or null where nothing is known on this slide.
    const data = this.data[number], n = this.facts.types.length, { target } = this.view;
    if (!data) return null;
    if (kind === "difference") {
      const { truth, prediction } = data;
      return truth && prediction ? (i) => prediction[i * n + target] - truth[i * n + target] : null;
    }
    const table = data[kind];
    if (!table) return null;
    return kind === "score" ? (i) => table[i] : (i) => table[i * n + target];
  }

  // ------------------------------------------------------------ moving about

  scale(panel) {
    // CSS pixels a slide pixel: two slides of known scale have the same micrometres a pixel on the screen.
    const all = this.shown.includes(panel) ? this.shown : [panel];
    const same = all.every((p) => p.slide.um), relative = (p) => (same ? p.slide.um / all[0].slide.um : 1);
    const fit = ({ stage, slide }) => Math.min(stage.clientWidth / slide.width, stage.clientHeight / slide.height);
    const whole = Math.min(...all.map((p) => fit(p) / relative(p)));
    return Math.max(whole, 1e-6) * this.view.zoom * relative(panel);
  }

  centre(panel, x, y) {
    const at = { x: clamp(x, 0, 1), y: clamp(y, 0, 1) };
    if (panel.middle() === this.view) return this.set(at);
    panel.centre = at;
    panel.touch("tiles", "spots", "marks");
    return this.schedule();
  }

  zoomAt(panel, event, factor) {
    // The place under the pointer stays where it is.
    const [x, y] = panel.toSlide(event), before = this.scale(panel);
    const most = Math.max(MOST_MAGNIFIED * this.view.zoom / before, 1);
    const zoom = clamp(this.view.zoom * factor, 1, most), keep = this.view.zoom / zoom;
    const { slide } = panel, middle = panel.middle();
    const moved = (at, n, centre) => (at + 0.5) / n * (1 - keep) + centre * keep;
    const to = [moved(x, slide.width, middle.x), moved(y, slide.height, middle.y)];
    this.set({ zoom });
    this.centre(panel, ...to);
  }

  whole() {
    for (const p of this.panels) p.centre = { x: 0.5, y: 0.5 };
    this.touch("tiles", "spots", "marks");
    this.set(WHOLE);
  }

  pick(slide, spot) { this.set({ spot, spot_of: slide === this.view.slide ? "" : slide }); }

  step(spot) {
    // Another spot of the same slide, brought into view where it lies outside.
    this.set({ spot });
    const panel = this.shown.find((p) => p.slide.name === this.picked);
    if (!panel || !panel.data) return;
    const { xy } = panel.data, x = xy[2 * this.view.spot], y = xy[2 * this.view.spot + 1];
    const { w, h, cx, cy, k } = panel.frame();
    if (Math.abs(x - cx) * k > w / 2 || Math.abs(y - cy) * k > h / 2) {
      this.centre(panel, (x + 0.5) / panel.slide.width, (y + 0.5) / panel.slide.height);
    }
  }

  towards(dx, dy) {
    // The nearest spot in a direction, within 45 degrees of it.
    const data = this.data[this.slideNumber(this.picked)], { spot } = this.view;
    if (!data) return spot;
    const { xy } = data, x = xy[2 * spot], y = xy[2 * spot + 1];
    let best = spot, least = Infinity;
    for (let i = 0; i < xy.length / 2; i++) {
      const right = xy[2 * i] - x, down = xy[2 * i + 1] - y;
      const along = right * dx + down * dy, across = Math.abs(right * dy - down * dx);
      const far = along + across;
      if (along > 0 && across <= along && far < least) { best = i; least = far; }
    }
    return best;
  }

  pressed(e, panel) {
    if (e.altKey || e.ctrlKey || e.metaKey) return;
    const { spot } = this.view, last = this.facts.slides[this.slideNumber(this.picked)].spots - 1;
    const middle = panel.middleOfStage();
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const steps = { PageUp: spot - 10, PageDown: spot + 10, Home: 0, End: last };
    const [right, down] = arrows[e.key] || [0, 0];
    if (e.key in arrows) this.step(e.shiftKey ? this.towards(right, down) : spot + right + down);
    else if (e.key in steps) this.step(steps[e.key]);
    else if (e.key === "+" || e.key === "=") this.zoomAt(panel, middle, 1.5);
    else if (e.key === "-") this.zoomAt(panel, middle, 1 / 1.5);
    else if (e.key === "0") this.whole();
    else return;
    e.preventDefault();
    e.stopPropagation();
  }

  // ------------------------------------------------------------ the spot under the pointer, the picked spot

  spot_lines(number, i) {
    // What is known of a spot, as pairs of name and text.
    const data = this.data[number], slide = this.facts.slides[number];
    const { target } = this.view, n = this.facts.types.length;
    const both = (pairs, text) => pairs.filter(([name]) => data[name])
      .map(([name, label]) => `${label} ${text(data[name][i * n + target])}`).join(", ");
    const amounts = both([["truth", "truth"], ["prediction", "prediction"]], (v) => written(10 ** v));
    const ranks = both([["rank", "truth"], ["predicted_rank", "prediction"]], written);
    const lines = [["spot", `${i} of ${slide.spots} on ${slide.name}`], ["ID", data.ids[i]]];
    lines.push([this.facts.types[target], amounts || "not known"]);
    if (ranks) lines.push(["rank", `${ranks} of ${n}`]);
    if (data.score) lines.push(["score", `${written(data.score[i])} (Spearman)`]);
    return lines;
  }

  hover(panel, spot, event) {
    const slide = panel.slide.name, before = this.hovered || { slide: "", spot: -1 };
    this.hovered = spot < 0 ? null : { slide, spot };
    this.tip.style.display = spot < 0 ? "none" : "block";
    if (before.spot !== spot || (spot >= 0 && before.slide !== slide)) {
      this.touch("marks");
      this.schedule();
      if (spot >= 0) this.write_tip(panel.number, spot);
    }
    if (spot < 0) return;
    const box = this.root.getBoundingClientRect(), room = box.width - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(Math.min(event.clientX - box.left + 14, room), 0)}px`;
    this.tip.style.top = `${event.clientY - box.top + 18}px`;
  }

  write_tip(number, spot) {
    const line = ([name, text]) => make("div", {}, make("b", {}, name), ` ${text}`);
    this.tip.replaceChildren(...this.spot_lines(number, spot).map(line));
  }

  // The picked spot: its slide's number, its slide, and the slide's arrays once they are here.
  get chosen() {
    const number = this.slideNumber(this.picked);
    return { number, slide: this.facts.slides[number], data: this.data[number], spot: this.view.spot };
  }

  draw_side() {
    const { number, slide, data, spot } = this.chosen;
    if (!data || !slide.spots) { this.facts_of_spot.replaceChildren(); this.bars.replaceChildren(); return; }
    const [x, y] = [data.xy[2 * spot], data.xy[2 * spot + 1]].map(written);
    const lines = this.spot_lines(number, spot);
    lines.splice(2, 0, ["at", `${x}, ${y} px`], ["patient", slide.patient]);
    this.facts_of_spot.replaceChildren(...lines.flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]));
    this.draw_bars(data, spot);
    this.drawn.patches = false;
  }

  draw_bars(data, spot) {
    // The most abundant types by truth, or by prediction where there is no truth.
    const n = this.facts.types.length, row = (t) => (t ? Array.from(t.subarray(spot * n, (spot + 1) * n)) : null);
    const truth = row(data.truth), prediction = row(data.prediction), whole = (r) => r && r.every(known);
    const by = [truth, prediction].find(whole);
    this.legend.style.display = by ? "" : "none";
    if (!by) {
      this.bars.replaceChildren(make("p", { class: "hk-dim" }, "nothing is known of what is in this spot"));
      return;
    }
    const order = by.map((v, i) => i).sort((a, b) => by[b] - by[a] || a - b).slice(0, TYPES_SHOWN);
    const all = [truth, prediction].filter(whole).flatMap((r) => order.map((i) => r[i]));
    const low = Math.floor(Math.min(...all) - 1e-9), high = Math.max(...all, low + 1e-6);
    const longest = Math.max(...order.map((i) => this.facts.types[i].length));
    this.bars.style.setProperty("--hk-name", `${clamp(longest + 1, 4, 20)}ch`);
    const ends = [low, high].map((v) => make("span", {}, written(10 ** v)));
    const axis = make("div", { class: "hk-row hk-axis" }, make("span"), make("div", { class: "hk-ticks" }, ...ends));
    const share = (v) => 100 * (v - low) / (high - low);
    this.bars.replaceChildren(...order.map((i) => this.bar_row(i, truth, prediction, share)), axis);
  }

  bar_row(i, truth, prediction, share) {
    // A type with its two bars; a button, because pressing it colours the spots by that type.
    const type = this.facts.types[i], there = (r) => r && known(r[i]);
    const bar = (r, css) => (there(r) ? [make("i", { class: css, style: `width:${share(r[i])}%` })] : []);
    const words = [truth, prediction].map((r) => (there(r) ? written(10 ** r[i]) : "–")).join(" / ");
    const track = make("span", { class: "hk-track" }, ...bar(truth, "hk-t"), ...bar(prediction, "hk-p"));
    return make("button", {
      type: "button",
      class: i === this.view.target ? "hk-row hk-chosen" : "hk-row",
      title: `${type}: truth / prediction ${words}; press to colour by it`,
      onclick: () => this.set({ target: i }),
    }, make("span", {}, type), track);
  }

  draw_patches() {
    const { number, slide, data, spot } = this.chosen, dpr = window.devicePixelRatio || 1;
    if (!data) return;
    const x = data.xy[2 * spot], y = data.xy[2 * spot + 1];
    this.patches.forEach((patch, i) => {
      const [size, label] = slide.patches[i], { canvas } = patch, ctx = canvas.getContext("2d");
      resize(canvas, canvas.clientWidth, canvas.clientWidth, dpr);
      patch.caption.textContent = label;
      const frame = { w: canvas.width, h: canvas.height, cx: x, cy: y, k: canvas.width / size };
      patch.missing = paintSlide(ctx, frame, slide, number, this.tiles, this.facts.tile_px);
      const radius = slide.spot_px / 2 * frame.k;
      if (radius < frame.w) ring(ctx, frame, x, y, radius, PICKED, dpr);
    });
    this.counts.patches = (this.counts.patches || 0) + 1;
  }

  // ------------------------------------------------------------ one drawing a frame, of what has changed

  arrived(key) {
    for (const p of this.shown) if (p.missing.includes(key)) p.touch("tiles");
    if (this.patches.some((p) => p.missing.includes(key))) this.drawn.patches = false;
    this.schedule();
  }

  relayout() { this.schedule(); this.drawn.patches = false; }

  schedule() {
    if (!this.due) this.due = requestAnimationFrame(() => { this.due = 0; this.draw(); });
  }

  draw() {
    const dpr = window.devicePixelRatio || 1;
    if (!this.root.isConnected || !this.panels[0].stage.clientWidth) return;
    const sizes = this.shown.map((p) => [p.stage.clientWidth, p.stage.clientHeight].join()).join(";");
    if (sizes !== this.sizes) this.touch("tiles", "spots", "marks");     // one panel's size decides the scale of both
    this.sizes = sizes;
    for (const p of this.shown) p.fit(dpr);
    for (const p of this.shown) p.draw(this.counts);
    if (!this.drawn.side) { this.drawn.side = true; this.counts.side = (this.counts.side || 0) + 1; this.draw_side(); }
    if (!this.drawn.patches) { this.drawn.patches = true; this.draw_patches(); }
    this.tiles.want([...new Set([...this.shown, ...this.patches].flatMap((p) => p.missing))]);
  }

  say(text) { this.status.textContent = text; }

  busy() { return Boolean(this.due || this.loading || this.tiles.asked.size || this.tiles.open().length); }

  // For tests and scripts: resolves when everything that is shown has been drawn.
  async settled() {
    do await new Promise((done) => requestAnimationFrame(done)); while (this.busy());
    return this.view;
  }
}

export function mount(root, host, facts, view, changed = () => {}) {
  const explorer = new Explorer(root, host, facts, view, changed);
  root.explorer = explorer;
  return explorer;
}

function render({ model, el }) {
  const root = document.createElement("div");
  el.append(root);
  const explorer = mount(root, kernelHost(model), model.get("facts"), model.get("view"), (view) => {
    model.set("view", view);
    model.save_changes();
  });
  const heard = () => explorer.set(model.get("view"), true);
  model.on("change:view", heard);
  return () => { model.off("change:view", heard); explorer.close(); };
}

export default { render };
