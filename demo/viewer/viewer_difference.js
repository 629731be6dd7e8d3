// Difference of two pictures: per pixel the largest of |R - R'|, |G - G'|, |B - B'|, in 8-bit levels.
//
// Computed in a worker from the pixels as they are in the files: no colour conversion, no
// premultiplication. Transparent pixels count as they look on black. One colour scale for all
// maps: level * gain, 0 black to 255 pale yellow.
(() => {
  "use strict";
  const S = (window.SrkdViewer ??= {});

  const GAINS = [1, 2, 4, 8, 16];

  // "magma" of matplotlib (CC0) at nine equal steps: lightness rises steadily, so that it reads
  // without hue as well.
  const SCALE = [
    [0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122],
    [229, 80, 100], [251, 135, 97], [254, 194, 135], [252, 253, 191],
  ];

  /** Colours of the levels 0..255, as RGBA bytes in one Uint32Array. */
  function palette() {
    const bytes = new Uint8ClampedArray(256 * 4);
    for (let level = 0; level < 256; level += 1) {
      const at = (level / 255) * (SCALE.length - 1);
      const low = Math.min(Math.floor(at), SCALE.length - 2);
      for (let c = 0; c < 3; c += 1) {
        bytes[4 * level + c] = SCALE[low][c] + (at - low) * (SCALE[low + 1][c] - SCALE[low][c]);
      }
      bytes[4 * level + 3] = 255;
    }
    return new Uint32Array(bytes.buffer);
  }

  /** Source of the worker; sees nothing of this file. */
  function worker() {
    // Read at a time: bounded memory beside the two decoded pictures, and far below what a canvas may measure.
    const BLOCK = { width: 4096, height: 128 };
    const maps = new Map();

    const decode = (blob) =>
      createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });

    function reader(bitmap) {
      const canvas = new OffscreenCanvas(BLOCK.width, BLOCK.height);
      const context = canvas.getContext("2d", { willReadFrequently: true });
      return (left, top, columns, rows) => {
        context.fillRect(0, 0, BLOCK.width, BLOCK.height); // black, under what is transparent
        context.drawImage(bitmap, left, top, columns, rows, 0, 0, columns, rows);
        return context.getImageData(0, 0, columns, rows).data;
      };
    }

    async function measure(id, blobs) {
      const [a, b] = await Promise.all(blobs.map(decode));
      const { width, height } = a;
      if (width !== b.width || height !== b.height) {
        return { refused: `${width}×${height} and ${b.width}×${b.height} pixels` };
      }
      const levels = new Uint8Array(width * height);
      const readA = reader(a);
      const readB = reader(b);
      let max = 0;
      let where = 0;
      const block = (left, top) => {
        const columns = Math.min(BLOCK.width, width - left);
        const rows = Math.min(BLOCK.height, height - top);
        const p = readA(left, top, columns, rows);
        const q = readB(left, top, columns, rows);
        for (let i = 0, pixel = 0; i < p.length; i += 4, pixel += 1) {
          const d = Math.max(
            Math.abs(p[i] - q[i]), Math.abs(p[i + 1] - q[i + 1]), Math.abs(p[i + 2] - q[i + 2]),
          );
          const at = (top + Math.floor(pixel / columns)) * width + left + (pixel % columns);
          levels[at] = d;
          if (d > max) {
            max = d;
            where = at;
          }
        }
      };
      for (let top = 0; top < height; top += BLOCK.height) {
        for (let left = 0; left < width; left += BLOCK.width) block(left, top);
      }
      a.close();
      b.close();
      maps.set(id, { levels, width, height });
      return { max, x: where % width, y: Math.floor(where / width) };
    }

    async function paint(id, gain, colours) {
      const { levels, width, height } = maps.get(id);
      const pixels = new Uint32Array(levels.length);
      for (let i = 0; i < levels.length; i += 1) pixels[i] = colours[Math.min(255, levels[i] * gain)];
      const image = new ImageData(new Uint8ClampedArray(pixels.buffer), width, height);
      return { gain, bitmap: await createImageBitmap(image) };
    }

    onmessage = async ({ data: { ticket, task, id, blobs, gain, colours } }) => {
      if (task === "drop") {
        maps.delete(id);
        return;
      }
      try {
        const reply = await (task === "measure" ? measure(id, blobs) : paint(id, gain, colours));
        postMessage({ ticket, ...reply }, reply.bitmap ? [reply.bitmap] : []);
      } catch (error) {
        postMessage({ ticket, error: error.message });
      }
    };
  }

  /** Maps of pairs of pictures, computed when first asked for. `changed` is called as they get ready. */
  class Differences {
    constructor(changed) {
      this.changed = changed;
      this.maps = new Map();
      this.waiting = new Map();
      this.tickets = 0;
      this.colours = palette();
    }

    ask(message) {
      if (!this.worker) {
        const url = URL.createObjectURL(new Blob([`(${worker})()`], { type: "text/javascript" }));
        this.worker = new Worker(url);
        URL.revokeObjectURL(url);
        this.worker.onmessage = ({ data }) => {
          this.waiting.get(data.ticket)(data);
          this.waiting.delete(data.ticket);
        };
        this.worker.onerror = () => {
          for (const resolve of this.waiting.values()) resolve({ error: "the browser stopped the computation" });
          this.waiting.clear();
        };
      }
      this.tickets += 1;
      const ticket = this.tickets;
      return new Promise((resolve) => {
        this.waiting.set(ticket, resolve);
        this.worker.postMessage({ ticket, ...message });
      });
    }

    /** The map of two loaded pictures: {state: "computing"|"ready"|"refused", max, x, y, bitmap, gain, reason}. */
    get(a, b, gain) {
      const id = `${a.url}\n${b.url}`;
      let map = this.maps.get(id);
      if (!map) {
        map = { id, state: "computing", urls: [a.url, b.url] };
        this.maps.set(id, map);
        this.measure(map, [a.blob, b.blob]);
      }
      map.wanted = gain;
      if (map.state === "ready" && map.gain !== gain && !map.painting) this.paint(map);
      return map;
    }

    async measure(map, blobs) {
      const reply = await this.ask({ task: "measure", id: map.id, blobs });
      if (this.maps.get(map.id) !== map) return;
      if (reply.refused || reply.error) {
        map.state = "refused";
        map.reason = reply.refused
          ? `No difference: ${reply.refused}. Compare pictures of one size.`
          : `No difference: ${reply.error}. Try a smaller picture.`;
        this.changed();
        return;
      }
      Object.assign(map, { max: reply.max, x: reply.x, y: reply.y });
      await this.paint(map);
    }

    async paint(map) {
      map.painting = true;
      const reply = await this.ask({ task: "paint", id: map.id, gain: map.wanted, colours: this.colours });
      map.painting = false;
      if (this.maps.get(map.id) !== map) {
        reply.bitmap?.close();
        return;
      }
      map.bitmap?.close();
      if (reply.error) {
        map.state = "refused";
        map.reason = `No difference: ${reply.error}. Try a smaller picture.`;
      } else {
        Object.assign(map, { state: "ready", bitmap: reply.bitmap, gain: reply.gain });
      }
      this.changed();
    }

    /** Free the maps of pictures that are not among `urls`. */
    keep(urls) {
      for (const [id, map] of this.maps) {
        if (map.urls.every((url) => urls.has(url))) continue;
        this.maps.delete(id);
        map.bitmap?.close();
        this.worker?.postMessage({ task: "drop", id });
      }
    }

    close() {
      this.keep(new Set());
      this.worker?.terminate();
    }
  }

  S.Differences = Differences;
  S.GAINS = GAINS;
  S.heatScale = SCALE;
})();
