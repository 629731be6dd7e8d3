// Pictures: fetched once, decoded once and kept decoded, so that a swap shows pixels in the same frame.
(() => {
  "use strict";
  const S = (window.SrkdViewer ??= {});

  /** What was fetched from one address. `state` is "loading", "ready" or "failed". */
  class Picture {
    constructor(url) {
      this.url = url;
      this.state = "loading";
      this.stop = new AbortController();
    }

    async load() {
      try {
        const reply = await fetch(this.url, { signal: this.stop.signal });
        if (!reply.ok) throw new Error(`the server answered ${reply.status}`);
        this.blob = await reply.blob();
        this.bitmap = await createImageBitmap(this.blob);
        if (this.stop.signal.aborted) this.bitmap.close();
        this.state = "ready";
      } catch (error) {
        this.state = "failed";
        this.reason = this.blob ? "this browser cannot decode it" : error.message;
      }
    }

    close() {
      this.stop.abort();
      this.bitmap?.close();
    }
  }

  /** Pictures by address. `changed` is called whenever one has loaded or failed. */
  class Pictures {
    constructor(changed) {
      this.byUrl = new Map();
      this.changed = changed;
    }

    get(url) {
      let picture = this.byUrl.get(url);
      if (!picture) {
        picture = new Picture(url);
        this.byUrl.set(url, picture);
        picture.load().then(() => {
          if (this.byUrl.get(url) === picture) this.changed();
        });
      }
      return picture;
    }

    /** Free what is not among `urls`. */
    keep(urls) {
      for (const [url, picture] of this.byUrl) {
        if (urls.has(url)) continue;
        this.byUrl.delete(url);
        picture.close();
      }
    }
  }

  const CHECKER_PX = 8;

  function checkerboard(context) {
    const tile = new OffscreenCanvas(2 * CHECKER_PX, 2 * CHECKER_PX);
    const c = tile.getContext("2d");
    c.fillStyle = "#9a9a9a";
    c.fillRect(0, 0, 2 * CHECKER_PX, 2 * CHECKER_PX);
    c.fillStyle = "#666";
    c.fillRect(0, 0, CHECKER_PX, CHECKER_PX);
    c.fillRect(CHECKER_PX, CHECKER_PX, CHECKER_PX, CHECKER_PX);
    return context.createPattern(tile, "repeat");
  }

  /**
   * Draw `bitmap` into the rectangle `at` of a canvas, no further than `end` device pixels from its
   * top left corner; null clears it. Squares stay squares unless `smooth`.
   */
  function draw(canvas, bitmap, at, smooth, end = Infinity) {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!bitmap) return;
    context.save();
    context.beginPath();
    context.rect(0, 0, Math.min(end, canvas.width), Math.min(end, canvas.height));
    context.clip();
    context.fillStyle = checkerboard(context);
    context.fillRect(at.x, at.y, at.w, at.h);
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, at.x, at.y, at.w, at.h);
    context.restore();
  }

  S.Pictures = Pictures;
  S.draw = draw;
})();
