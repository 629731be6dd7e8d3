// Comparison viewer: 1 to 9 pictures of one region, side by side, in place or across a divide.
//
//   const viewer = SrkdViewer.mount(element, data)   `element` holds the markup of viewer.html
//   viewer.update(data)       other pictures; zoom, pan, mode and chosen panes stay
//   viewer.state()            plain data: mode, keys, zoom, pan, ...
//   viewer.restore(state)     take over such data, or a part of it, from a link for example
//   viewer.destroy()
//   event "srkd-viewer"       bubbles from `element` after every change; detail = state()
//
//   data = {scale, lr: [h, w], name, protocol, truth: key|null, reference: key|null, images: [
//     {key, label, role: "truth"|"nearest"|"bicubic"|"model", url, w, h, alt, lines: [text, ...]}]}
//
// Mounting again on the same element is an update, also where a framework has put the markup there anew.
// The pictures are canvases, drawn in device pixels: all panes share one rectangle, enlarged pixels
// are squares, and a swap in the stack only turns one drawn canvas visible and the other hidden.
// Nothing moves by itself, so there is nothing to reduce for prefers-reduced-motion.
(() => {
  "use strict";
  const S = (window.SrkdViewer ??= {});
  const { make, write } = S.controls;
  const G = S.geometry;

  const MOST = 6; // panes at a time
  S.NARROW_PX = 560; // one picture at a time is more than two thumbnails
  const SPOKEN_AFTER_MS = 300;

  class Viewer {
    constructor(element) {
      this.element = element;
      this.images = [];
      this.mode = null; // until the user chooses: grid, or stack where it is narrow
      this.fit = true;
      this.zoom = 1;
      this.centre = [0.5, 0.5];
      this.size = { W: 1, H: 1 };
      this.pane = { vw: 1, vh: 1 };
      this.dpr = window.devicePixelRatio;
      this.chosen = new Map(); // key -> shown or not, where the user has said so
      this.active = null;
      this.slider = { left: null, right: null, at: 0.5 };
      this.lens = { on: false, k: 4, at: [0.5, 0.5], pinned: false };
      this.difference = { on: false, against: null, gain: 4 };
      this.smooth = false;
      this.holding = false;
      this.help = false;
      this.pictures = new S.Pictures(() => this.refresh());
      this.differences = new S.Differences(() => this.refresh());
      this.hydrate();
    }

    // ---- markup ----

    hydrate() {
      this.listeners?.abort();
      this.listeners = new AbortController();
      const { signal } = this.listeners;
      const root = this.element.querySelector(".srkd-viewer");
      if (!root) throw new Error("SrkdViewer.mount: the element holds no .srkd-viewer; put viewer.html there first.");
      this.root = root;
      this.stage = root.querySelector(".srkd-stage");
      this.crops = root.querySelector(".srkd-crops");
      this.status = root.querySelector(".srkd-status");
      this.panes = new Map();
      this.chipsOf = null;
      this.divide = make("div", "srkd-divide");
      this.handle = make("div", "srkd-handle");
      this.handle.tabIndex = 0;
      this.handle.setAttribute("role", "slider");
      this.handle.ariaValueMin = "0";
      this.handle.ariaValueMax = "100";
      this.divide.append(this.handle);
      this.stage.replaceChildren(this.divide);
      this.crops.replaceChildren();
      S.controls.dress(root);
      S.listen(this, signal);
      this.watch(signal);
    }

    watch(signal) {
      // After the frame: the layout changes these sizes itself.
      const resized = new ResizeObserver(() => {
        cancelAnimationFrame(this.resizing);
        this.resizing = requestAnimationFrame(() => this.refresh());
      });
      resized.observe(this.root);
      resized.observe(this.stage);
      const theme = () => {
        // Gradio marks dark with a class and light with none, whatever the system prefers.
        const system = !document.querySelector(".gradio-container");
        const dark = document.body.classList.contains("dark")
          || (system && matchMedia("(prefers-color-scheme: dark)").matches);
        this.root.dataset.theme = dark ? "dark" : "light";
      };
      const themed = new MutationObserver(theme);
      themed.observe(document.body, { attributes: true, attributeFilter: ["class"] });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme, { signal });
      window.addEventListener("resize", () => this.refresh(), { signal });
      document.addEventListener("fullscreenchange", () => this.refresh(), { signal });
      signal.addEventListener("abort", () => {
        resized.disconnect();
        themed.disconnect();
      });
      theme();
    }

    button(name) {
      return this.root.querySelector(`button[data-do="${name}"]`);
    }

    // ---- which pictures ----

    image(key) {
      return this.images.find((image) => image.key === key);
    }

    /** Keys of the panes: what the user chose; then, up to six, the truth, the models, bicubic, nearest. */
    shown() {
      const rank = { truth: 0, model: 1, bicubic: 2, nearest: 3 };
      const keys = this.images.map((image) => image.key);
      const picked = new Set(keys.filter((key) => this.chosen.get(key)).slice(0, MOST));
      const others = this.images
        .filter((image) => !this.chosen.has(image.key))
        .sort((a, b) => rank[a.role] - rank[b.role]);
      for (const image of others) if (picked.size < MOST) picked.add(image.key);
      if (!picked.size && keys.length) picked.add(keys.at(-1));
      return keys.filter((key) => picked.has(key));
    }

    current() {
      const shown = this.shown();
      return shown.includes(this.active) ? this.active : shown.at(-1);
    }

    /** What the others are held against: the truth, else the reference model, else the first picture. */
    against() {
      const wanted = [this.difference.against, this.data?.truth, this.data?.reference];
      return wanted.find((key) => key && this.image(key)) ?? this.images[0]?.key;
    }

    /** Left and right of the slider. */
    sides() {
      const shown = this.shown();
      const right = this.image(this.slider.right) ? this.slider.right : this.current();
      const bicubic = this.images.find((image) => image.role === "bicubic" && image.key !== right);
      const left = this.image(this.slider.left)
        ? this.slider.left
        : bicubic?.key ?? shown.find((key) => key !== right) ?? right;
      return [left, right];
    }

    layoutMode() {
      const mode = this.mode ?? (this.root.clientWidth < S.NARROW_PX ? "stack" : "grid");
      return mode === "slider" && this.images.length < 2 ? "stack" : mode;
    }

    /** Keys of the panes that can be seen now. */
    visible() {
      const mode = this.layoutMode();
      if (mode === "grid") return this.shown();
      return mode === "stack" ? [this.current()].filter(Boolean) : this.sides();
    }

    /** Keys that the chips mark as picked. */
    front() {
      return this.layoutMode() === "slider" ? this.sides() : [this.current()];
    }

    // ---- data in, state out ----

    update(data) {
      this.data = data;
      this.images = data.images.slice(0, 9);
      this.size = { W: data.lr[1] * data.scale, H: data.lr[0] * data.scale };
      const urls = new Set(this.images.map((image) => image.url));
      this.pictures.keep(urls);
      this.differences.keep(urls);
      this.refresh();
      return this;
    }

    state() {
      const [left, right] = this.sides();
      return {
        mode: this.layoutMode(),
        keys: this.shown(),
        active: this.current() ?? null,
        fit: this.fit,
        zoom: this.zoom,
        pan: [this.centre[0] * this.size.W, this.centre[1] * this.size.H],
        smooth: this.smooth,
        slider: { left, right, at: this.slider.at },
        lens: { on: this.lens.on, k: this.lens.k, at: [...this.lens.at] },
        difference: { on: this.difference.on, against: this.against(), gain: this.difference.gain },
        ready: this.images.length > 0 && this.wanted().every((key) => this.picture(key).state !== "loading"),
      };
    }

    /** Take over what `state()` gave, or a part of it. Unknown keys of pictures wait until they appear. */
    restore(state) {
      if (["grid", "stack", "slider"].includes(state.mode)) this.mode = state.mode;
      if (Array.isArray(state.keys)) {
        this.chosen.clear();
        for (const image of this.images) this.chosen.set(image.key, false);
        for (const key of state.keys) this.chosen.set(key, true);
      }
      if (state.active !== undefined) this.active = state.active;
      if (Number.isFinite(state.zoom) && state.zoom > 0) this.zoom = state.zoom;
      if (Array.isArray(state.pan) && state.pan.length === 2 && state.pan.every(Number.isFinite)) {
        this.centre = [state.pan[0] / this.size.W, state.pan[1] / this.size.H];
      }
      if (typeof state.fit === "boolean") this.fit = state.fit;
      if (typeof state.smooth === "boolean") this.smooth = state.smooth;
      const { slider = {}, lens = {}, difference = {} } = state;
      const within = (value) => G.clamp(Number(value) || 0, 0, 1);
      for (const side of ["left", "right"]) if (slider[side]) this.slider[side] = slider[side];
      if (slider.at !== undefined) this.slider.at = within(slider.at);
      if (typeof lens.on === "boolean") this.lens.on = lens.on;
      if ([1, 2, 4, 8].includes(lens.k)) this.lens.k = lens.k;
      if (Array.isArray(lens.at)) [this.lens.at, this.lens.pinned] = [[within(lens.at[0]), within(lens.at[1])], true];
      if (typeof difference.on === "boolean") this.difference.on = difference.on;
      if (difference.against) this.difference.against = difference.against;
      if (S.GAINS.includes(difference.gain)) this.difference.gain = difference.gain;
      this.refresh();
    }

    destroy() {
      this.listeners.abort();
      cancelAnimationFrame(this.frame);
      cancelAnimationFrame(this.resizing);
      clearTimeout(this.later);
      clearTimeout(this.speech);
      this.pictures.keep(new Set());
      this.differences.close();
      this.stage.replaceChildren();
      this.crops.replaceChildren();
      mounted.delete(this.element);
    }

    // ---- what the user does ----

    act(name, button) {
      if (button?.ariaDisabled === "true") return;
      const key = button?.dataset.image;
      const actions = {
        grid: () => (this.mode = "grid"),
        stack: () => (this.mode = "stack"),
        slider: () => (this.mode = "slider"),
        fit: () => (this.fit = true),
        one: () => this.zoomTo(1),
        in: () => this.zoomTo(G.stepZoom(this.zoom, 1)),
        out: () => this.zoomTo(G.stepZoom(this.zoom, -1)),
        west: () => this.step(-1, 0),
        east: () => this.step(1, 0),
        north: () => this.step(0, -1),
        south: () => this.step(0, 1),
        lens: () => (this.lens.on = !this.lens.on),
        difference: () => (this.difference.on = !this.difference.on),
        pixels: () => (this.smooth = !this.smooth),
        weaker: () => this.gain(-1),
        stronger: () => this.gain(1),
        previous: () => this.flick(-1),
        next: () => this.flick(1),
        pick: () => this.pick(key),
        show: () => this.toggle(key),
        keys: () => (this.help = !this.help),
        fullscreen: () => this.fill(),
      };
      actions[name]();
      this.refresh();
    }

    fill() {
      const done = document.fullscreenElement ? document.exitFullscreen() : this.root.requestFullscreen();
      done.catch(() => this.say("This browser does not let the viewer fill the screen."));
    }

    flick(sign) {
      if (this.layoutMode() === "slider") {
        this.moveDivide(this.slider.at + 0.02 * sign);
        return;
      }
      const shown = this.shown();
      const next = shown.indexOf(this.current()) + sign + shown.length;
      this.active = shown[next % shown.length];
    }

    pick(key) {
      if (this.layoutMode() === "slider") {
        this.slider.right = key;
        return;
      }
      if (this.shown().includes(key) || this.toggle(key)) this.active = key;
    }

    toggle(key) {
      const shown = this.shown();
      const on = !shown.includes(key);
      if (on && shown.length >= MOST) return this.say(`${MOST} pictures are shown at most: hide one first.`);
      if (!on && shown.length === 1) return this.say("One picture has to stay.");
      // The others stay as they are, also those shown only by default.
      for (const image of this.images) this.chosen.set(image.key, shown.includes(image.key));
      this.chosen.set(key, on);
      return true;
    }

    gain(sign) {
      const at = S.GAINS.indexOf(this.difference.gain) + sign;
      this.difference.gain = S.GAINS[G.clamp(at, 0, S.GAINS.length - 1)];
    }

    choose(what, value) {
      if (what === "k") this.lens.k = Number(value);
      else if (what === "against") this.difference.against = value;
      else this.slider[what] = value;
      this.refresh();
    }

    hold(on) {
      if (this.holding === on || this.images.length < 2) return;
      this.holding = on;
      this.refresh();
    }

    /** A press on a pane. The lens comes there and stays; a second press frees it, where there is hovering. */
    tap(key, point, hovering) {
      if (this.lens.on) {
        const held = this.lens.pinned;
        this.lens.pinned = false;
        this.hover(point);
        this.lens.pinned = !hovering || !held;
      }
      if (this.layoutMode() === "grid") this.active = key;
      this.refresh();
    }

    hover(point) {
      if (!this.lens.on || this.lens.pinned) return;
      const [x, y] = G.toPicture(point, this.centre, this.zoom, this.size, this.pane);
      this.lens.at = [G.clamp(x / this.size.W, 0, 1), G.clamp(y / this.size.H, 0, 1)];
      this.repaint();
    }

    moveDivide(at) {
      this.slider.at = G.clamp(at, 0, 1);
      this.refresh();
    }

    // ---- zoom and pan ----

    /** Whether the picture is larger than its pane. */
    slack() {
      const at = G.place(this.centre, this.zoom, this.size, this.pane);
      return at.w > this.pane.vw || at.h > this.pane.vh;
    }

    zoomTo(zoom, point = [this.pane.vw / 2, this.pane.vh / 2]) {
      const target = G.toPicture(point, this.centre, this.zoom, this.size, this.pane);
      const before = this.zoom;
      this.zoom = G.limitZoom(zoom, this.size, this.pane);
      this.fit = Math.abs(this.zoom / G.fitZoom(this.size, this.pane) - 1) < 1e-6;
      this.centre = G.centreFor(point, target, this.zoom, this.size, this.pane);
      this.repaint();
      return this.zoom !== before;
    }

    zoomBy(factor, point) {
      return this.zoomTo(this.zoom * factor, point);
    }

    toggleOne(point) {
      if (this.fit && this.zoom !== 1) this.zoomTo(1, point);
      else this.fit = true;
      this.refresh();
    }

    /** Move by device pixels. */
    panBy(x, y) {
      this.centre = [
        this.centre[0] + x / (this.size.W * this.zoom),
        this.centre[1] + y / (this.size.H * this.zoom),
      ];
      this.repaint();
    }

    /** One press of an arrow: an eighth of the pane; with the lens, a quarter of its region. */
    step(x, y) {
      if (!this.lens.on) {
        this.panBy((x * this.pane.vw) / 8, (y * this.pane.vh) / 8);
        return;
      }
      const region = this.region();
      const move = Math.max(1, Math.round(region.side / 4)) * this.data.scale;
      this.lens.pinned = true;
      this.lens.at = [
        G.clamp(this.lens.at[0] + (x * move) / this.size.W, 0, 1),
        G.clamp(this.lens.at[1] + (y * move) / this.size.H, 0, 1),
      ];
      if (this.slack()) this.centre = [...this.lens.at];
    }

    // ---- layout and drawing ----

    picture(key) {
      return this.pictures.get(this.image(key).url);
    }

    /** Keys whose pictures must be decoded, in the order of the data. */
    wanted() {
      const keys = new Set([...this.shown(), ...this.visible(), this.against()]);
      return this.images.map((image) => image.key).filter((key) => keys.has(key));
    }

    refresh() {
      if (!this.images.length) return;
      this.buildPanes();
      S.controls.sync(this);
      this.captions();
      this.layout();
      this.paint();
      this.announce();
    }

    repaint() {
      cancelAnimationFrame(this.frame);
      this.frame = requestAnimationFrame(() => {
        this.paint();
        this.announce();
      });
    }

    announce() {
      clearTimeout(this.speech);
      this.speech = setTimeout(() => {
        this.say(S.sentence(this));
        this.element.dispatchEvent(new CustomEvent("srkd-viewer", { bubbles: true, detail: this.state() }));
      }, SPOKEN_AFTER_MS);
    }

    say(text) {
      write(this.status, text);
      return false;
    }
  }

  Object.assign(Viewer.prototype, S.drawing);

  const mounted = new WeakMap();

  S.mount = (element, data) => {
    let viewer = mounted.get(element);
    if (!viewer) {
      viewer = new Viewer(element);
      mounted.set(element, viewer);
    } else if (viewer.root !== element.querySelector(".srkd-viewer")) {
      viewer.hydrate();
    }
    return viewer.update(data);
  };
})();
