// Mouse, touch, wheel and keys, turned into calls of the viewer. Nothing here draws.
//
// The page keeps its own gestures: keys act only while the viewer has the focus, the wheel zooms
// only with Ctrl or then, and one finger scrolls the page until the picture is zoomed in.
(() => {
  "use strict";
  const S = (window.SrkdViewer ??= {});
  const TAP_PX = 5; // a press that moves less is a click

  const middle = (a, b) => [(a.clientX + b.clientX) / 2, (a.clientY + b.clientY) / 2];
  const apart = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);

  /** Position in a pane, in device pixels; null outside the panes. All panes have the same extent. */
  function pointIn(viewer, x, y) {
    for (const view of viewer.stage.querySelectorAll(".srkd-view")) {
      const box = view.getBoundingClientRect();
      const inside = x >= box.left && x < box.right && y >= box.top && y < box.bottom;
      if (inside && getComputedStyle(view).visibility !== "hidden") {
        return { key: view.dataset.image, at: [(x - box.left) * viewer.dpr, (y - box.top) * viewer.dpr] };
      }
    }
    return null;
  }

  function mouse(viewer, signal) {
    const { stage } = viewer;
    let drag = null;
    let moved = false;
    stage.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch" || event.button !== 0 || event.target.closest(".srkd-handle")) return;
      moved = false;
      if (!pointIn(viewer, event.clientX, event.clientY)) return;
      drag = [event.clientX, event.clientY];
      stage.setPointerCapture(event.pointerId);
    }, { signal });
    stage.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch") return;
      if (drag) {
        const step = [event.clientX - drag[0], event.clientY - drag[1]];
        if (!moved && Math.hypot(...step) < TAP_PX) return;
        moved = true;
        drag = [event.clientX, event.clientY];
        viewer.panBy(-step[0] * viewer.dpr, -step[1] * viewer.dpr);
        return;
      }
      const point = pointIn(viewer, event.clientX, event.clientY);
      if (point) viewer.hover(point.at);
    }, { signal });
    for (const end of ["pointerup", "pointercancel"]) {
      stage.addEventListener(end, () => (drag = null), { signal });
    }
    stage.addEventListener("click", (event) => {
      const point = pointIn(viewer, event.clientX, event.clientY);
      if (point && !moved && !event.target.closest(".srkd-handle")) {
        viewer.tap(point.key, point.at, event.pointerType !== "touch");
      }
    }, { signal });
    stage.addEventListener("dblclick", (event) => {
      const point = pointIn(viewer, event.clientX, event.clientY);
      if (point && !event.target.closest(".srkd-handle")) viewer.toggleOne(point.at);
    }, { signal });
    stage.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !viewer.root.contains(document.activeElement)) return;
      const point = pointIn(viewer, event.clientX, event.clientY);
      if (!point) return;
      const lines = event.deltaMode === 0 ? 1 : 30;
      const step = S.geometry.clamp(event.deltaY * lines, -60, 60);
      const changed = viewer.zoomBy(Math.exp(-step * 0.005), point.at);
      // At either end of the zoom a plain wheel goes on scrolling the page.
      if (changed || event.ctrlKey) event.preventDefault();
    }, { signal, passive: false });
  }

  function touch(viewer, signal) {
    const { stage } = viewer;
    let last = null;
    const start = (event) => {
      last = [...event.touches].map((t) => ({ clientX: t.clientX, clientY: t.clientY }));
    };
    stage.addEventListener("touchstart", start, { signal, passive: true });
    stage.addEventListener("touchend", start, { signal, passive: true });
    stage.addEventListener("touchmove", (event) => {
      const now = [...event.touches];
      if (!last || last.length !== now.length || event.target.closest(".srkd-handle")) return;
      if (now.length === 2) {
        event.preventDefault();
        const from = middle(...last);
        const to = middle(...now);
        const point = pointIn(viewer, ...to);
        viewer.panBy((from[0] - to[0]) * viewer.dpr, (from[1] - to[1]) * viewer.dpr);
        if (point) viewer.zoomBy(apart(...now) / Math.max(1, apart(...last)), point.at);
      } else if (now.length === 1 && viewer.slack()) {
        event.preventDefault();
        const step = [last[0].clientX - now[0].clientX, last[0].clientY - now[0].clientY];
        viewer.panBy(step[0] * viewer.dpr, step[1] * viewer.dpr);
      }
      start(event);
    }, { signal, passive: false });
  }

  function divide(viewer, signal) {
    const { handle } = viewer;
    const follow = (event) => {
      const box = handle.parentElement.getBoundingClientRect();
      viewer.moveDivide((event.clientX - box.left) / box.width);
    };
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      handle.focus();
      event.preventDefault();
    }, { signal });
    handle.addEventListener("pointermove", (event) => {
      if (handle.hasPointerCapture(event.pointerId)) follow(event);
    }, { signal });
    const ends = { Home: 0, End: 1 };
    const steps = { PageUp: 0.1, PageDown: -0.1, ArrowUp: 0.01, ArrowDown: -0.01 };
    handle.addEventListener("keydown", (event) => {
      if (event.key in ends) viewer.moveDivide(ends[event.key]);
      else if (event.key in steps && !event.shiftKey) viewer.moveDivide(viewer.slider.at + steps[event.key]);
      else return; // left and right are keys of the whole viewer
      event.preventDefault();
      event.stopPropagation();
    }, { signal });
  }

  /** Name of a key as `data-key` of its button spells it. */
  function nameOf(event) {
    const same = { " ": "Space", "=": "+", _: "-" };
    if (event.key.startsWith("Arrow")) return (event.shiftKey ? "Shift+" : "") + event.key;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    return same[key] ?? key;
  }

  /** Whether a key belongs to the browser. AltGr, which looks like Ctrl+Alt, and Option of a Mac type [ and ]. */
  function shortcut(event) {
    const typed = event.getModifierState("AltGraph") || (!event.ctrlKey && "[]".includes(event.key));
    return event.metaKey || (!typed && (event.ctrlKey || event.altKey));
  }

  function keys(viewer, signal) {
    const { root } = viewer;
    root.addEventListener("keydown", (event) => {
      if (shortcut(event) || event.target.closest("select")) return;
      const name = nameOf(event);
      if (name === "Space" && event.target.closest("button")) return; // presses the button itself
      if (name === "Space") {
        event.preventDefault();
        if (!event.repeat) viewer.hold(true);
        return;
      }
      const button = [...root.querySelectorAll("button[data-key]")].find((b) => b.dataset.key === name);
      if (!button || button.closest("[hidden]")) return;
      event.preventDefault();
      viewer.act(button.dataset.do, button);
    }, { signal });
    root.addEventListener("keyup", (event) => {
      if (event.key === " " && !event.target.closest("button")) viewer.hold(false);
    }, { signal });
    root.addEventListener("focusout", (event) => {
      if (!root.contains(event.relatedTarget)) viewer.hold(false);
    }, { signal });
  }

  function buttons(viewer, signal) {
    const { root, stage } = viewer;
    root.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-do]");
      if (!button) return;
      const held = button.dataset.do === "hold";
      // A mouse has held it already; keyboards and screen readers switch it on and off.
      if (!held) viewer.act(button.dataset.do, button);
      else if (event.detail === 0) viewer.hold(!viewer.holding);
      // After the mouse, Space and the arrows mean the pictures again, not the button.
      if (event.detail > 0 && document.activeElement === button) stage.focus({ preventScroll: true });
    }, { signal });
    const hold = root.querySelector('[data-do="hold"]');
    hold.addEventListener("pointerdown", (event) => {
      hold.setPointerCapture(event.pointerId);
      viewer.hold(true);
    }, { signal });
    for (const end of ["pointerup", "pointercancel"]) {
      hold.addEventListener(end, () => viewer.hold(false), { signal });
    }
    hold.addEventListener("contextmenu", (event) => event.preventDefault(), { signal });
    root.addEventListener("change", (event) => {
      const select = event.target.closest("select[data-pick]");
      if (select) viewer.choose(select.dataset.pick, select.value);
    }, { signal });
  }

  S.listen = (viewer, signal) => {
    for (const part of [mouse, touch, divide, keys, buttons]) part(viewer, signal);
  };
})();
