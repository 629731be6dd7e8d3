// Where a picture lies in a pane. Pure numbers, no DOM.
//
//   W, H    picture, in its own pixels              vw, vh  pane, in device pixels
//   zoom    device pixels per picture pixel: 1 is "1:1", whatever the devicePixelRatio
//   centre  the point of the picture in the middle of the pane, as fractions of W and H
//
// The same numbers go to every pane, and the offset is rounded to whole device pixels, so that
// all panes agree to the pixel and 1:1 is not resampled.
(() => {
  "use strict";
  const S = (window.SrkdViewer ??= {});

  const STEPS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32];

  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  /** The largest zoom that shows the whole picture; whole numbers above 1, where pixels are squares of one size. */
  function fitZoom(size, pane) {
    const zoom = Math.min(pane.vw / size.W, pane.vh / size.H);
    return zoom > 1 ? Math.floor(zoom) : zoom;
  }

  /** Zoom from "whole picture, or 1:1 where that is smaller" to x32. */
  function limitZoom(zoom, size, pane) {
    const fit = fitZoom(size, pane);
    return clamp(zoom, Math.min(fit, 1), Math.max(fit, STEPS.at(-1)));
  }

  /** The next of the round zooms in the direction of `sign`. */
  function stepZoom(zoom, sign) {
    const steps = sign > 0 ? STEPS : [...STEPS].reverse();
    return steps.find((step) => sign * (step - zoom) > 1e-3 * zoom) ?? zoom;
  }

  /** The centre moved so that no pane shows more than the surround needs. */
  function limitCentre(centre, zoom, size, pane) {
    const along = (c, picture, view) => {
      const half = view / (2 * picture * zoom);
      return half >= 0.5 ? 0.5 : clamp(c, half, 1 - half);
    };
    return [along(centre[0], size.W, pane.vw), along(centre[1], size.H, pane.vh)];
  }

  /** Rectangle of the whole picture in the pane, in whole device pixels. */
  function place(centre, zoom, size, pane) {
    return {
      x: Math.round(pane.vw / 2 - centre[0] * size.W * zoom),
      y: Math.round(pane.vh / 2 - centre[1] * size.H * zoom),
      w: Math.max(1, Math.round(size.W * zoom)),
      h: Math.max(1, Math.round(size.H * zoom)),
    };
  }

  /** Point of the pane (device pixels) to picture pixels. */
  function toPicture(point, centre, zoom, size, pane) {
    const at = place(centre, zoom, size, pane);
    return [(point[0] - at.x) / zoom, (point[1] - at.y) / zoom];
  }

  /** The centre that keeps what is under `point` there while the zoom changes. */
  function centreFor(point, target, zoom, size, pane) {
    return [
      (target[0] + (pane.vw / 2 - point[0]) / zoom) / size.W,
      (target[1] + (pane.vh / 2 - point[1]) / zoom) / size.H,
    ];
  }

  /**
   * The smallest length in CSS pixels that is whole in device pixels, up to 20; 1 where there is none.
   * A canvas of a multiple of it is not resampled, wherever on the page it begins: 2 at a ratio of 1.5.
   */
  function wholeStep(dpr) {
    for (let step = 1; step <= 20; step += 1) {
      if (Math.abs(step * dpr - Math.round(step * dpr)) < 1e-4) return step;
    }
    return 1;
  }

  /** Columns of the grid that show the pictures largest. All lengths in CSS pixels. */
  function columns(count, width, height, size, gap, caption) {
    let best = { cols: 1, scale: 0 };
    for (let cols = 1; cols <= count; cols += 1) {
      const rows = Math.ceil(count / cols);
      const w = (width - gap * (cols - 1)) / cols;
      const h = (height - gap * (rows - 1)) / rows - caption;
      const scale = Math.min(w / size.W, h / size.H);
      // Narrower panes have no room for their captions.
      if (scale > best.scale && (cols === 1 || w >= 150)) best = { cols, scale };
    }
    return best.cols;
  }

  S.geometry = {
    clamp, fitZoom, limitZoom, stepZoom, limitCentre, place, toPicture, centreFor, wholeStep, columns,
  };
})();
