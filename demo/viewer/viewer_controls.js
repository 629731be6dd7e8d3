// The bars around the pictures: chips, menus, captions, legend, list of keys. DOM from data, as text only.
(() => {
  "use strict";
  const S = (window.SrkdViewer ??= {});

  function make(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  /** Change a text only where it differs: live regions announce, and selections break, on every write. */
  function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  const percent = (zoom) => `${zoom < 0.1 ? (100 * zoom).toFixed(1) : Math.round(100 * zoom)} %`;

  const SPOKEN = {
    Space: "Space", ArrowLeft: "←", ArrowRight: "→", "-": "−",
    "Shift+ArrowLeft": "Shift ←", "Shift+ArrowRight": "Shift →",
    "Shift+ArrowUp": "Shift ↑", "Shift+ArrowDown": "Shift ↓",
  };

  /** Once per mount: hints in the buttons and the list of keys, both read from the markup. */
  function dress(root) {
    const list = root.querySelector(".srkd-list");
    const row = (key, text) => {
      const entry = make("div", "srkd-entry");
      const term = make("dt");
      term.append(make("span", "srkd-key", key));
      entry.append(term, make("dd", "", text));
      list.append(entry);
    };
    list.replaceChildren();
    row("1–9", "Pick a picture");
    for (const button of root.querySelectorAll("button[data-key]")) {
      const { key } = button.dataset;
      const shown = SPOKEN[key] ?? key;
      row(shown, button.title);
      button.setAttribute("aria-keyshortcuts", key === "+" ? "Plus" : key);
      button.title += ` (${shown})`;
      if (!button.classList.contains("srkd-icon")) {
        const hint = make("span", "srkd-key", key === "Space" ? "␣" : shown);
        hint.ariaHidden = "true";
        button.append(hint);
      }
    }
  }

  function chips(viewer, box) {
    const wanted = viewer.images.map((i) => `${i.key}\n${i.label}`).join("\n\n");
    if (viewer.chipsOf !== wanted) {
      viewer.chipsOf = wanted;
      box.replaceChildren(...viewer.images.map((image, index) => {
        const chip = make("div", "srkd-chip");
        const box = make("button", "srkd-btn srkd-check");
        const pick = make("button", "srkd-btn srkd-pick");
        for (const button of [box, pick]) {
          button.type = "button";
          button.dataset.image = image.key;
        }
        box.dataset.do = "show";
        box.setAttribute("role", "checkbox");
        box.ariaLabel = box.title = `Show ${image.label}`;
        pick.dataset.do = "pick";
        pick.dataset.key = index + 1;
        pick.setAttribute("aria-keyshortcuts", index + 1);
        pick.title = `${image.label} (${index + 1})`;
        pick.append(make("span", "srkd-key", `${index + 1}`), make("span", "srkd-name", image.label));
        chip.append(box, pick);
        return chip;
      }));
    }
    const shown = viewer.shown();
    const front = viewer.front();
    for (const button of box.querySelectorAll("button")) {
      const { image } = button.dataset;
      if (button.dataset.do === "show") button.ariaChecked = `${shown.includes(image)}`;
      else button.ariaPressed = `${front.includes(image)}`;
    }
  }

  function menu(select, images, value) {
    const wanted = images.map((i) => `${i.key}\n${i.label}`).join("\n\n");
    if (select.dataset.of !== wanted) {
      select.dataset.of = wanted;
      select.replaceChildren(...images.map((image) => {
        const option = make("option", "", image.label);
        option.value = image.key;
        return option;
      }));
    }
    select.value = value ?? "";
  }

  function legend(root, gain) {
    const colours = S.heatScale.map((rgb) => `rgb(${rgb})`).join(",");
    const top = Math.floor(255 / gain);
    root.querySelector(".srkd-ramp").style.background = `linear-gradient(to right,${colours})`;
    const [low, half, high] = root.querySelectorAll(".srkd-ticks span");
    const highest = gain === 1 ? "255 levels" : `≥ ${top} levels`;
    write(low, "0");
    write(half, `${Math.round(top / 2)}`);
    write(high, highest);
    root.querySelector(".srkd-legend").ariaLabel =
      `Colours of all maps: black 0, pale yellow ${highest} of 255; the largest of red, green and blue`;
  }

  /** Label and lines under a pane; `index` is the number of its key. */
  function caption(pane, index, image, extra) {
    const lines = [...image.lines, ...extra];
    const wanted = [index, image.label, ...lines].join("\n");
    if (pane.captionOf === wanted) return;
    pane.captionOf = wanted;
    const head = make("span", "srkd-label");
    head.append(make("span", "srkd-key", `${index}`), make("span", "srkd-name", image.label));
    pane.caption.replaceChildren(head, ...lines.map((line) => make("span", "srkd-line", line)));
  }

  /** Where it is narrow the picture comes first, what to choose from after it. */
  function narrow(root) {
    const on = root.clientWidth < S.NARROW_PX;
    const choose = root.querySelector(".srkd-choose");
    const before = root.querySelector(on ? ".srkd-lens" : ".srkd-keys");
    root.toggleAttribute("data-narrow", on);
    if (choose.previousElementSibling !== before) before.after(choose);
  }

  function about(root, { name, lr: [h, w], scale, protocol }) {
    const size = `LR ${w}×${h} px, ×${scale} to ${w * scale}×${h * scale} px`;
    write(root.querySelector(".srkd-about"), [name, size, protocol].filter(Boolean).join(" · "));
  }

  /** Everything around the pictures, from the viewer's state. */
  function sync(viewer) {
    const { root } = viewer;
    const mode = viewer.layoutMode();
    const several = viewer.images.length > 1;
    const press = (name, on) => {
      viewer.button(name).ariaPressed = `${on}`;
    };
    const allow = (name, on) => {
      if (on) viewer.button(name).removeAttribute("aria-disabled");
      else viewer.button(name).ariaDisabled = "true";
    };
    root.dataset.mode = mode;
    narrow(root);
    about(root, viewer.data);
    root.toggleAttribute("data-holding", viewer.holding);
    for (const name of ["grid", "stack", "slider"]) press(name, mode === name);
    press("lens", viewer.lens.on);
    press("difference", viewer.difference.on);
    press("pixels", !viewer.smooth);
    press("hold", viewer.holding);
    press("fullscreen", document.fullscreenElement === root);
    viewer.button("fullscreen").hidden = !document.fullscreenEnabled;
    viewer.button("keys").ariaExpanded = `${viewer.help}`;
    root.querySelector(".srkd-keys").hidden = !viewer.help;
    for (const name of ["slider", "difference", "hold", "previous", "next"]) allow(name, several);
    const at = S.GAINS.indexOf(viewer.difference.gain);
    allow("weaker", at > 0);
    allow("stronger", at < S.GAINS.length - 1);
    for (const options of root.querySelectorAll(".srkd-options[data-for]")) {
      options.hidden = !(options.dataset.for === "slider" ? mode === "slider" : viewer.difference.on);
    }
    chips(viewer, root.querySelector(".srkd-chips"));
    const sides = viewer.sides();
    menu(root.querySelector('[data-pick="left"]'), viewer.images, sides[0]);
    menu(root.querySelector('[data-pick="right"]'), viewer.images, sides[1]);
    menu(root.querySelector('[data-pick="against"]'), viewer.images, viewer.against());
    root.querySelector(".srkd-lens").hidden = !viewer.lens.on;
    root.querySelector('[data-pick="k"]').value = `${viewer.lens.k}`;
    write(root.querySelector(".srkd-gain"), `gain × ${viewer.difference.gain}`);
    legend(root, viewer.difference.gain);
    place(viewer);
  }

  /** The part that changes with every step of a pan or a zoom. */
  function place(viewer) {
    const { root } = viewer;
    write(root.querySelector(".srkd-zoom"), percent(viewer.zoom));
    viewer.button("fit").ariaPressed = `${viewer.fit}`;
    viewer.button("one").ariaPressed = `${viewer.zoom === 1}`;
    const movable = viewer.slack() || viewer.lens.on;
    for (const name of ["west", "north", "south", "east"]) {
      if (movable) viewer.button(name).removeAttribute("aria-disabled");
      else viewer.button(name).ariaDisabled = "true";
    }
  }

  S.controls = { make, write, percent, dress, sync, place, caption };
})();
