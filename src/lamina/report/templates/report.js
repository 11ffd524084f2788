
(function () {
  "use strict";
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const sections = Array.from(document.querySelectorAll("section.page"));
  const links = Array.from(document.querySelectorAll("nav a"));
  const select = document.getElementById("run");
  const drawn = new Set();
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage"]] };
  const PAPER = 680;
  root.classList.add("js");

  function narrow() { return window.innerWidth < 600; }

  function put(target, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    for (const key of keys) { target = target[key] = target[key] || {}; }
    if (value === null) { delete target[last]; } else { target[last] = value; }
  }

  function layoutOf(figure, slim) {
    const layout = JSON.parse(JSON.stringify(figure.layout));
    if (slim) {
      for (const path of Object.keys(figure.narrow || {})) {
        if (path !== "hide") { put(layout, path, figure.narrow[path]); }
      }
      layout.font.size = 12;
      layout.margin.t = 8;
    }
    return layout;
  }

  function draw(plot, width) {
    const figure = figures[plot.dataset.figure];
    const slim = !width && narrow();
    const layout = layoutOf(figure, slim);
    if (width) { layout.width = width; }
    const hide = slim ? (figure.narrow || {}).hide || [] : [];
    const data = JSON.parse(JSON.stringify(figure.data)).filter((trace, i) => !hide.includes(i));
    const slider = document.querySelector('input[data-slides="' + CSS.escape(plot.dataset.figure) + '"]');
    if (slider) { data[0].x = figure.frames[Number(slider.value)].x; }
    Plotly.react(plot, data, layout, Object.assign({ displayModeBar: slim || width ? false : "hover" }, config));
    drawn.add(plot);
  }

  function shown() { return sections.filter((s) => s.classList.contains("shown")); }

  function place() {
    const match = /^#(?:(\d+)-)?([a-z]+)$/.exec(location.hash);
    const pages = links.map((link) => link.dataset.page);
    const runs = select ? select.options.length : 1;
    const page = match && pages.includes(match[2]) ? match[2] : pages[0];
    const run = match && match[1] && Number(match[1]) < runs ? Number(match[1]) : 0;
    return { page: page, run: run };
  }

  function show() {
    const now = place();
    if (select) {
      select.value = String(now.run);
      select.parentElement.hidden = now.page === "compare";
    }
    for (const link of links) {
      const current = link.dataset.page === now.page;
      link.href = "#" + (select ? now.run + "-" : "") + link.dataset.page;
      if (current) { link.setAttribute("aria-current", "page"); } else { link.removeAttribute("aria-current"); }
      if (current && link.scrollIntoView) { link.scrollIntoView({ block: "nearest", inline: "nearest" }); }
    }
    for (const section of sections) {
      const own = section.dataset.run === "-1" || Number(section.dataset.run) === now.run;
      section.classList.toggle("shown", own && section.dataset.page === now.page);
    }
    for (const section of shown()) { section.querySelectorAll(".plot").forEach((plot) => draw(plot)); }
  }

  window.addEventListener("hashchange", function () {
    if (location.hash === "#main") { return; }
    show();
    window.scrollTo(0, 0);
  });
  if (select) { select.addEventListener("change", function () { location.hash = select.value + "-" + place().page; }); }

  for (const slider of document.querySelectorAll("input[data-slides]")) {
    slider.addEventListener("input", function () {
      const figure = figures[slider.dataset.slides];
      const frame = figure.frames[Number(slider.value)];
      const plot = document.querySelector('.plot[data-figure="' + CSS.escape(slider.dataset.slides) + '"]');
      slider.nextElementSibling.value = frame.name;
      slider.setAttribute("aria-valuetext", frame.name);
      Plotly.restyle(plot, { x: [frame.x] }, [0]);
    });
  }

  let slim = narrow();
  window.addEventListener("resize", function () {
    if (slim !== narrow()) {
      slim = narrow();
      shown().forEach((section) => section.querySelectorAll(".plot").forEach((plot) => draw(plot)));
    }
  });

  window.addEventListener("beforeprint", function () {
    root.classList.add("printing");
    document.querySelectorAll(".plot").forEach((plot) => draw(plot, PAPER));
  });
  window.addEventListener("afterprint", function () {
    root.classList.remove("printing");
    shown().forEach((section) => section.querySelectorAll(".plot").forEach((plot) => draw(plot)));
  });

  show();

  const pause = document.getElementById("pause");
  if (pause) {
    const key = "lamina-scroll";
    const seconds = Number(document.body.dataset.reload);
    let paused = false;
    try {
      window.scrollTo(0, Number(sessionStorage.getItem(key) || 0));
    } catch (error) { /* a browser that stores nothing for files */ }
    pause.addEventListener("click", function () {
      paused = !paused;
      pause.setAttribute("aria-pressed", String(paused));
      pause.textContent = paused ? "Go on reloading" : "Pause reloading";
    });
    setInterval(function () {
      if (paused || document.hidden) { return; }
      try { sessionStorage.setItem(key, String(window.scrollY)); } catch (error) { /* as above */ }
      location.reload();
    }, 1000 * seconds);
  }
})();
