// The page around the viewer: mounts it, hands it new results, lists downloads, keeps settings in the address.
(() => {
  "use strict";
  const NAMES = ["scale", "models", "engine", "precision", "reference"];

  // Empty values are left out. Commas stay readable, and no settings need escaping otherwise.
  const setQuery = (pairs) => {
    const url = new URL(window.location.href);
    pairs.forEach(([name, value]) => {
      if (value === "") url.searchParams.delete(name);
      else url.searchParams.set(name, value);
    });
    window.history.replaceState(null, "", url.href.replaceAll("%2C", ","));
  };

  // The view as a link: layout, and the region where it is not the whole picture. `view` is Gradio's own.
  const viewQuery = ({ mode, fit, zoom, pan }) => [
    ["layout", mode ?? ""],
    ["zoom", fit ? "" : zoom.toFixed(3)],
    ["at", fit ? "" : pan.map(Math.round).join(",")],
  ];

  const viewAsked = () => {
    const query = new URLSearchParams(window.location.search);
    const asked = { mode: query.get("layout") };
    if (query.has("zoom") && query.has("at")) {
      asked.fit = false;
      asked.zoom = Number(query.get("zoom"));
      asked.pan = query.get("at").split(",").slice(0, 2).map(Number);
    }
    return asked;
  };

  // Gradio calls this when the component appears; `watch` reports a new value. The DOM stays, so zoom stays.
  const viewer = (element, props, watch) => {
    const mount = element.querySelector(".srkd-mount");
    const empty = element.querySelector(".srkd-page-empty");
    let mounted = null;
    const show = () => {
      const data = props.value;
      mount.hidden = !data;
      empty.hidden = Boolean(data);
      if (!data) return;
      data.images.forEach((image) => { image.url = image.file.url; });
      if (mounted) {
        mounted.update(data);
        return;
      }
      mounted = window.SrkdViewer.mount(mount, data);
      mounted.restore(viewAsked());
      mount.addEventListener("srkd-viewer", (event) => setQuery(viewQuery(event.detail)));
    };
    watch("value", show);
    show();
  };

  const size = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

  const add = (parent, tag, text) => {
    const child = document.createElement(tag);
    child.textContent = text;
    return parent.appendChild(child);
  };

  // One job at a time of each kind: from the press until Gradio says that it is over, what starts it does nothing.
  // Not `disabled`, which would throw the keyboard's user out of place.
  const STARTERS = {
    compare: "#srkd-go, #srkd-speed, #srkd-examples button",
    batch: "#srkd-batch-go",
  };
  const running = new Set();

  const mark = (job) => {
    document.querySelectorAll(STARTERS[job]).forEach((button) => { button.ariaDisabled = `${running.has(job)}`; });
  };

  const ended = (job) => {
    running.delete(job);
    mark(job);
    return [];
  };

  // While capturing: before Gradio's own listeners, which put every press in the queue.
  document.addEventListener("click", (event) => {
    const job = Object.keys(STARTERS).find((name) => event.target.closest(STARTERS[name]));
    if (!job) return;
    if (running.has(job)) {
      event.preventDefault();
      event.stopImmediatePropagation();
      return;
    }
    running.add(job);
    mark(job);
  }, true);

  const examples = (element, props, trigger, event) => {
    const box = element.querySelector(".srkd-page-examples");
    element.hidden = props.value.length === 0;
    props.value.forEach((example, index) => {
      const button = add(box, "button", "");
      button.type = "button";
      const picture = add(button, "img", "");
      picture.src = example.file.url;
      picture.alt = "";
      add(button, "span", example.title);
      button.addEventListener("click", () => trigger(event, { index }));
    });
  };

  // Links with the size before the click; all text goes in as text.
  const downloads = (element, props, watch) => {
    const box = element.querySelector(".srkd-page-downloads");
    const show = () => {
      box.replaceChildren();
      if (!props.value) return;
      const list = add(box, "ul", "");
      props.value.files.forEach((file) => {
        const item = add(list, "li", "");
        const link = add(item, "a", file.orig_name);
        link.href = file.url;
        link.download = file.orig_name;
        add(item, "span", size(file.size));
      });
      props.value.notes.forEach((note) => add(box, "p", note));
    };
    watch("value", show);
    show();
  };

  // The settings as a link: no pictures, only names.
  const link = (values) => {
    setQuery(NAMES.map((name, i) => [name, [values[i] ?? ""].flat().join(",")]));
    return [];
  };

  // On a narrow screen the result lies below the settings.
  const toResult = (values) => {
    const right = document.getElementById("srkd-right");
    const left = document.getElementById("srkd-left");
    if (right.offsetTop > left.offsetTop + 50) {
      const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
      right.scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    }
    return values;
  };

  window.SrkdPage = { viewer, examples, downloads, link, toResult, ended };
})();
