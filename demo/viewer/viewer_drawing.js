// Panes, lens and their pixels: the methods of the viewer that lay out and draw.
(() => {
  "use strict";
  const S = (window.SrkdViewer ??= {});
  const { make, write } = S.controls;
  const G = S.geometry;

  const GAP_PX = 8;
  const CAPTION_PX = 64; // guess for the choice of columns; the real height is measured
  const LOWEST_PX = 140;
  const STRIP_PX = 96; // room to zoom into a picture that is far wider than high
  const CROP_PX = { least: 92, most: 240 };

  /** One line for screen readers: what is to be seen, how large. */
  S.sentence = (viewer) => {
    const names = viewer.visible().map((key) => viewer.image(viewer.source(key)).label);
    const wanted = viewer.wanted();
    const loading = wanted.filter((key) => viewer.picture(key).state === "loading").length;
    if (loading) return `Loading: ${wanted.length - loading} of ${wanted.length} pictures.`;
    const parts = [`Shown: ${names.join(", ")}`, `zoom ${S.controls.percent(viewer.zoom)}`];
    if (viewer.difference.on) {
      parts.push(`difference against ${viewer.image(viewer.against()).label}, gain ${viewer.difference.gain}`);
    }
    return `${parts.join(" · ")}.`;
  };

  /** A ring around the largest difference: dark on bright and bright on dark. */
  function ring(canvas, x, y, dpr) {
    const context = canvas.getContext("2d");
    for (const [width, colour] of [[4, "#000"], [2, "#fff"]]) {
      context.beginPath();
      context.arc(x, y, 9 * dpr, 0, 2 * Math.PI);
      context.lineWidth = width * dpr;
      context.strokeStyle = colour;
      context.stroke();
    }
  }

  S.drawing = {
    // ---- what a pane shows ----

    /** Key of the picture in the pane of `key`: its own, or the reference while that is held. */
    source(key) {
      return this.holding ? this.against() : key;
    },

    /** {bitmap, map} of a pane, or {text, failed} that stands in for pixels that are not there. */
    content(key) {
      const source = this.source(key);
      const picture = this.picture(source);
      if (picture.state === "loading") return { text: "loading…" };
      if (picture.state === "failed") return { text: "did not load" };
      const against = this.against();
      if (!this.difference.on || this.holding || source === against) return { bitmap: picture.bitmap };
      const other = this.picture(against);
      if (other.state !== "ready") return { text: other.state === "failed" ? "nothing to compare with" : "loading…" };
      const map = this.differences.get(picture, other, this.difference.gain);
      if (map.state === "refused") return { text: map.reason };
      return map.bitmap ? { bitmap: map.bitmap, map } : { text: "computing the difference…" };
    },

    /** Further lines of the caption: what the pane shows when it is not simply its picture. */
    remarks(key) {
      const source = this.image(this.source(key));
      const remarks = [];
      if (source.w !== this.size.W || source.h !== this.size.H) {
        remarks.push(`${source.w}×${source.h} px, stretched to the others' size`);
      }
      if (this.holding && source.key !== key) remarks.push("shown while Reference is held");
      if (!this.difference.on || this.holding) return remarks;
      const against = this.against();
      if (source.key === against) return [...remarks, "the others are compared with this picture"];
      const { map } = this.content(key);
      if (!map) return remarks;
      const where = map.max ? `max |difference| ${map.max} of 255 at x ${map.x}, y ${map.y}` : "every pixel is the same";
      return [...remarks, where];
    },

    // ---- panes ----

    buildPanes() {
      const wanted = this.wanted();
      for (const [key, pane] of this.panes) {
        if (wanted.includes(key)) continue;
        pane.figure.remove();
        this.panes.delete(key);
      }
      const visible = this.visible();
      const under = this.layoutMode() === "stack" ? this.shown() : [];
      for (const key of wanted) {
        if (!this.panes.has(key)) this.panes.set(key, this.newPane(key));
        const pane = this.panes.get(key);
        const place = visible.includes(key) ? "seen" : under.includes(key) ? "under" : "away";
        pane.figure.dataset.place = place;
        pane.figure.ariaHidden = `${place !== "seen"}`;
      }
      // The order of the data, without moving what is in place: moving an element resets its focus.
      wanted.forEach((key, index) => {
        const { figure } = this.panes.get(key);
        if (this.stage.children[index] !== figure) this.stage.insertBefore(figure, this.stage.children[index]);
      });
    },

    newPane(key) {
      const figure = make("figure", "srkd-pane");
      const view = make("div", "srkd-view");
      const canvas = make("canvas", "srkd-canvas");
      const box = make("div", "srkd-region");
      const message = make("p", "srkd-message");
      const caption = make("figcaption", "srkd-caption");
      view.dataset.image = key;
      canvas.setAttribute("role", "img");
      view.append(canvas, box, message);
      figure.append(view, caption);
      return { figure, view, canvas, box, message, caption, drawn: null };
    },

    captions() {
      const numbers = this.images.map((image) => image.key);
      const front = this.layoutMode() === "grid" ? this.current() : null;
      const sides = this.layoutMode() === "slider" ? this.sides() : [];
      for (const [key, pane] of this.panes) {
        const source = this.source(key);
        const image = this.image(source);
        S.controls.caption(pane, numbers.indexOf(source) + 1, image, this.remarks(key));
        pane.canvas.ariaLabel = this.difference.on && !this.holding && source !== this.against()
          ? `Difference of ${image.label} against ${this.image(this.against()).label}. ${this.remarks(key).join(" ")}`
          : image.alt;
        pane.figure.toggleAttribute("data-front", key === front && this.shown().length > 1);
        pane.figure.dataset.side = key === sides[1] ? "right" : key === sides[0] ? "left" : "";
      }
    },

    /** Width inside the padding of an element. */
    inner(element) {
      const style = getComputedStyle(element);
      return element.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    },

    /** Sizes of all panes: equal, and whole numbers of device pixels. */
    layout() {
      const width = this.inner(this.stage);
      if (width <= 0) return;
      this.dpr = window.devicePixelRatio;
      const full = document.fullscreenElement === this.root;
      const count = this.layoutMode() === "grid" ? this.visible().length : 1;
      const share = count > 2 ? 0.92 : 0.78; // of the window; two rows need more
      const padding = this.stage.clientWidth - width;
      const height = full ? this.stage.clientHeight - padding : Math.max(280, share * window.innerHeight);
      const cols = G.columns(count, width, height, this.size, GAP_PX, CAPTION_PX);
      const rows = Math.ceil(count / cols);
      const step = G.wholeStep(this.dpr);
      const whole = (length, round) => Math.max(step, round(length / step) * step);
      const paneWidth = whole((width - GAP_PX * (cols - 1)) / cols, Math.floor);
      this.stage.style.setProperty("--srkd-columns", `repeat(${cols}, ${paneWidth}px)`);
      this.stage.style.setProperty("--srkd-width", `${paneWidth}px`);
      const captions = [...this.panes.values()].map(({ caption }) => caption.offsetHeight);
      const room = Math.max(LOWEST_PX, (height - GAP_PX * (rows - 1)) / rows - Math.max(0, ...captions));
      const own = Math.max(STRIP_PX, (paneWidth * this.size.H) / this.size.W);
      const most = whole(Math.min(room, own), Math.ceil);
      const inDevice = (w, h) => ({ vw: Math.round(w * this.dpr), vh: Math.round(h * this.dpr) });
      // A small picture enlarged by a whole number leaves a margin: at the sides, not above and below as well.
      const tall = (this.size.H * G.fitZoom(this.size, inDevice(paneWidth, most))) / this.dpr;
      const paneHeight = Math.min(most, whole(Math.max(LOWEST_PX, tall), Math.ceil));
      this.pane = inDevice(paneWidth, paneHeight);
      this.stage.style.setProperty("--srkd-height", `${paneHeight}px`);
    },

    // ---- pixels ----

    /** Draw what can be seen now; what lies under it in the stack follows when the browser has time. */
    paint() {
      if (!this.images.length || !this.stage.clientWidth) return;
      this.zoom = this.fit ? G.fitZoom(this.size, this.pane) : G.limitZoom(this.zoom, this.size, this.pane);
      this.centre = G.limitCentre(this.centre, this.zoom, this.size, this.pane);
      S.controls.place(this);
      const seen = this.visible();
      for (const key of seen) this.paintPane(key);
      this.paintDivide();
      this.paintLens();
      this.stage.dataset.pan = this.slack() ? "free" : "none";
      this.alerts();
      clearTimeout(this.later);
      this.later = setTimeout(() => {
        for (const key of this.panes.keys()) if (!seen.includes(key)) this.paintPane(key);
      }, 0);
    },

    paintPane(key) {
      const pane = this.panes.get(key);
      if (!pane) return;
      const { bitmap = null, map, text = "" } = this.content(key);
      const at = G.place(this.centre, this.zoom, this.size, this.pane);
      const smooth = this.smooth || this.zoom < 1;
      write(pane.message, text);
      pane.figure.ariaBusy = `${text.endsWith("…")}`;
      const { vw, vh } = this.pane;
      const drawn = [bitmap, at.x, at.y, at.w, at.h, vw, vh, smooth];
      if (pane.drawn && drawn.every((value, i) => value === pane.drawn[i])) return;
      pane.drawn = drawn;
      if (pane.canvas.width !== vw || pane.canvas.height !== vh) {
        pane.canvas.width = vw;
        pane.canvas.height = vh;
      }
      S.draw(pane.canvas, bitmap, at, smooth);
      if (map?.max) ring(pane.canvas, at.x + (map.x + 0.5) * this.zoom, at.y + (map.y + 0.5) * this.zoom, this.dpr);
    },

    paintDivide() {
      const on = this.layoutMode() === "slider";
      this.divide.hidden = !on;
      const [left, right] = this.sides();
      const x = Math.round(this.slider.at * this.pane.vw) / this.dpr;
      for (const [key, pane] of this.panes) {
        pane.view.style.clipPath = on && key === right && left !== right ? `inset(0 0 0 ${x}px)` : "";
      }
      if (!on) return;
      const share = Math.round(100 * this.slider.at);
      this.handle.style.left = `${x}px`;
      this.handle.ariaValueNow = `${share}`;
      this.handle.ariaLabel = `Divide between ${this.image(left).label} and ${this.image(right).label}`;
      this.handle.ariaValueText = `${share} % ${this.image(left).label}`;
    },

    /** What failed, and the refused differences, each said once. */
    alerts() {
      const failed = this.wanted().filter((key) => this.picture(key).state === "failed");
      const lines = failed.map((key) =>
        `${this.image(key).label} did not load: ${this.picture(key).reason}. Run the comparison again.`);
      for (const key of this.visible()) {
        const { text } = this.content(key);
        if (text?.startsWith("No difference")) lines.push(text);
      }
      write(this.root.querySelector(".srkd-alert"), [...new Set(lines)].join(" "));
      this.stage.ariaBusy = `${this.wanted().some((key) => this.picture(key).state === "loading")}`;
    },

    // ---- lens ----

    /** Region of the lens in LR pixels: {x, y, side}; `px` is the side of a crop in device pixels. */
    region() {
      const width = this.inner(this.crops);
      const room = Math.floor((width + GAP_PX) / (CROP_PX.least + GAP_PX));
      const cols = G.clamp(this.shown().length, 1, Math.max(1, room));
      const fitting = (width - GAP_PX * (cols - 1)) / cols;
      const wish = Math.floor(Math.min(fitting, CROP_PX.most) * this.dpr);
      const [h, w] = this.data.lr;
      const one = this.lens.k * this.data.scale; // device pixels per LR pixel
      const side = G.clamp(Math.floor(wish / one), 1, Math.min(h, w));
      const first = (fraction, extent) =>
        G.clamp(Math.round(fraction * extent - side / 2), 0, extent - side);
      return { x: first(this.lens.at[0], w), y: first(this.lens.at[1], h), side, px: side * one };
    },

    paintLens() {
      for (const { box } of this.panes.values()) box.hidden = !this.lens.on;
      if (!this.lens.on) {
        this.crops.replaceChildren();
        return;
      }
      const region = this.region();
      const { scale } = this.data;
      const at = G.place(this.centre, this.zoom, this.size, this.pane);
      for (const { box } of this.panes.values()) {
        box.style.left = `${(at.x + region.x * scale * this.zoom) / this.dpr}px`;
        box.style.top = `${(at.y + region.y * scale * this.zoom) / this.dpr}px`;
        box.style.width = box.style.height = `${(region.side * scale * this.zoom) / this.dpr}px`;
      }
      write(
        this.root.querySelector(".srkd-where"),
        `LR x ${region.x}–${region.x + region.side - 1}, y ${region.y}–${region.y + region.side - 1}`
          + (this.lens.pinned ? " · press a picture to move it" : " · press a picture to hold it here"),
      );
      const keys = this.shown();
      while (this.crops.children.length > keys.length) this.crops.lastChild.remove();
      keys.forEach((key, index) => this.paintCrop(key, region, index));
    },

    paintCrop(key, region, index) {
      let figure = this.crops.children[index];
      if (!figure) {
        figure = make("figure", "srkd-crop");
        const canvas = make("canvas", "srkd-canvas");
        canvas.setAttribute("role", "img");
        figure.append(canvas, make("figcaption", "srkd-line"));
        this.crops.append(figure);
      }
      const [canvas, caption] = figure.children;
      const image = this.image(this.source(key));
      const one = this.lens.k * this.data.scale;
      const step = G.wholeStep(this.dpr);
      const side = Math.ceil(region.px / this.dpr / step) * step;
      canvas.width = canvas.height = Math.round(side * this.dpr);
      canvas.style.width = canvas.style.height = `${side}px`;
      const place = {
        x: -region.x * one, y: -region.y * one, w: this.size.W * this.lens.k, h: this.size.H * this.lens.k,
      };
      S.draw(canvas, this.content(key).bitmap ?? null, place, this.smooth, region.px);
      canvas.ariaLabel = `Region of ${image.label}`;
      figure.style.width = canvas.style.width;
      write(caption, image.label);
    },
  };
})();
