"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const add = (parent, tag, text, className) => {
    const element = document.createElement(tag);
    if (text) element.textContent = text;
    if (className) element.className = className;
    parent.append(element);
    return element;
  };
  const DASHES = [[], [9, 4], [2, 3], [10, 3, 2, 3]];
  const colour = (n) => css(`--c${n % 7}`);

  // Curves: several runs in one chart, all charts with one cursor and one zoom.
  const {runs, titles} = data.curves;
  let charts = [];
  const along = (run, steps, axis) => {
    if (axis === "step") return steps;
    if (axis === "images") return run.images === null ? null : steps.map((s) => s * run.images);
    const [known, seconds] = run.seconds;
    if (!known.length) return null;
    let k = 0;
    return steps.map((s) => {
      while (k < known.length - 2 && known[k + 1] < s) k++;
      const next = Math.min(k + 1, known.length - 1), width = known[next] - known[k];
      const share = width > 0 ? Math.min(1, (s - known[k]) / width) : 0;
      return Math.max(0, (seconds[k] + share * (seconds[next] - seconds[k])) / 3600);
    });
  };
  const short = (v) => v == null ? "–" : v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
  const draw = () => {
    const place = document.getElementById("charts");
    if (!place) return;
    charts.forEach((chart) => chart.destroy());
    charts = [];
    place.replaceChildren();
    const axis = document.getElementById("axis").value;
    const sync = uPlot.sync("runs");
    let [low, high] = [Infinity, -Infinity];
    runs.forEach((run) => Object.values(run.columns).forEach(([steps]) => (along(run, steps, axis) || []).forEach((x) => {
      low = Math.min(low, x);
      high = Math.max(high, x);
    })));
    for (const [name, [title, help]] of Object.entries(titles)) {
      const tables = [], series = [{label: {step: "step", images: "images", hours: "hours"}[axis], value: (u, v) => short(v)}];
      runs.forEach((run, n) => {
        const column = run.columns[name], x = column && along(run, column[0], axis);
        if (!x || !x.length) return;
        const [before, after] = [x[0] > low, x[x.length - 1] < high];  // all charts begin and end alike
        tables.push([[...(before ? [low] : []), ...x, ...(after ? [high] : [])], [...(before ? [null] : []), ...column[1], ...(after ? [null] : [])]]);
        series.push({
          label: runs.length > 1 ? run.name : title, stroke: colour(n), dash: DASHES[n % 4], width: 1.6,
          points: {show: x.length < 40, size: 5}, value: (u, v) => short(v),
        });
      });
      if (!tables.length) continue;
      const box = add(place, "div", "", "chart");
      box.dataset.name = name;
      add(box, "h3", title);
      add(box, "p", help, "help");
      const line = {stroke: css("--soft"), grid: {stroke: css("--line"), width: 1}, ticks: {stroke: css("--line"), width: 1}, font: "11px system-ui, sans-serif"};
      charts.push(new uPlot({
        width: box.clientWidth, height: 190, series, scales: {x: {time: false}},
        axes: [{...line, values: (u, v) => v.map((one) => one >= 1e4 ? `${+(one / 1000).toPrecision(4)}k` : String(+one.toPrecision(6)))},
               {...line, size: 58, values: (u, v) => v.map((one) => one === 0 ? "0" : Math.abs(one) < 1e-3 || Math.abs(one) >= 1e5 ? one.toExponential(1) : String(+one.toPrecision(5)))}],
        cursor: {sync: {key: sync.key}, drag: {x: true, y: false}}, legend: {live: true},
      }, tables.length > 1 ? uPlot.join(tables) : tables[0], box));
    }
  };

  // Tables: a press on a heading sorts, a second one the other way.
  const key = (row, n) => row.cells[n].textContent.trim();
  document.querySelectorAll("table.sortable").forEach((table) => {
    table.querySelectorAll("th button").forEach((button, n) => button.addEventListener("click", () => {
      const head = button.parentElement, up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const number = (text) => text === "" ? NaN : Number(text.replaceAll(",", "").replace(/ ?%$/, ""));
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [s, t] = [key(a, n), key(b, n)], [x, y] = [number(s), number(t)];
        if ((s === "") !== (t === "")) return s === "" ? 1 : -1;  // what is not known comes last
        return (up ? 1 : -1) * (isNaN(x) || isNaN(y) ? s.localeCompare(t) : x - y);
      });
      table.tBodies[0].append(...rows);
    }));
  });

  // Maps: thumbnails by their features. Colour and the pattern of the frame say the label or the cluster.
  const PATTERNS = [[], [5, 3], [2, 2]];
  const frame = (pen, n, x, y, side, width) => {
    pen.strokeStyle = colour(n);
    pen.lineWidth = width;
    pen.setLineDash(PATTERNS[Math.floor(n / 7) % 3]);
    pen.strokeRect(x, y, side, side);
    pen.setLineDash([]);
  };
  const redraws = [];
  document.querySelectorAll("canvas.map").forEach((canvas) => {
    const map = data.maps[canvas.dataset.run], section = canvas.parentElement;
    const by = section.querySelector(".by"), find = section.querySelector(".find"), hits = section.querySelector(".hits");
    const under = section.querySelector(".under"), legend = section.querySelector(".legend");
    const sheet = new Image(), pen = canvas.getContext("2d");
    const said = (n) => map.names[n] + (map.labels[n] >= 0 ? ` (${map.classes[map.labels[n]]})` : "") + `, cluster ${map.clusters[n] + 1}`;
    let hovered = -1, places = [];
    const groups = () => by.value === "label" ? map.labels : by.value === "cluster" ? map.clusters : null;
    const show = () => {
      if (!canvas.clientWidth) return;
      const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
      if (canvas.width !== Math.round(w * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, w, h);
      const side = Math.max(12, Math.min(28, w / 34)), group = groups(), words = find.value.trim().toLowerCase();
      const tile = sheet.naturalWidth / map.across;
      places = map.points.map(([x, y]) => [4 + x * (w - side - 8), 4 + (1 - y) * (h - side - 8)]);
      const match = map.names.map((name) => !words || name.toLowerCase().includes(words));
      const one = (n, size, width) => {
        const x = Math.min(places[n][0], w - size - 3), y = Math.min(places[n][1], h - size - 3);
        if (tile) pen.drawImage(sheet, (n % map.across) * tile, Math.floor(n / map.across) * tile, tile, tile, x, y, size, size);
        if (group && group[n] >= 0) frame(pen, group[n], x, y, size, width);
      };
      pen.globalAlpha = 0.12;
      map.points.forEach((_, n) => { if (!match[n]) one(n, side, 1); });
      pen.globalAlpha = 1;
      map.points.forEach((_, n) => { if (match[n]) one(n, words ? side * 1.4 : side, words ? 3 : 2); });
      if (hovered >= 0) one(hovered, Math.min(96, side * 3.4), 3);
      const count = match.filter(Boolean).length;
      hits.textContent = words ? `${count} of ${match.length} images` : "";
      if (words && count && hovered < 0) under.textContent = said(match.indexOf(true)) + (count > 1 ? ` and ${count - 1} more` : "");
    };
    const explain = () => {
      legend.replaceChildren();
      const group = groups();
      if (!group) return;
      const names = by.value === "label" ? map.classes : [...new Set(group)].sort((a, b) => a - b).map((n) => `cluster ${n + 1}`);
      names.slice(0, 42).forEach((name, n) => {
        const item = add(legend, "li"), mark = add(item, "canvas");
        mark.width = mark.height = 16;
        frame(mark.getContext("2d"), n, 2, 2, 12, 3);
        item.append(name);
      });
    };
    const point = (event) => {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      let nearest = -1, least = 30 * 30;
      places.forEach(([a, b], n) => {
        const d = (a + 10 - x) ** 2 + (b + 10 - y) ** 2;
        if (d < least) [nearest, least] = [n, d];
      });
      if (nearest === hovered) return;
      hovered = nearest;
      under.textContent = nearest < 0 ? "" : said(nearest);
      show();
    };
    ["pointermove", "pointerdown"].forEach((kind) => canvas.addEventListener(kind, point));
    canvas.addEventListener("pointerleave", () => { hovered = -1; under.textContent = ""; show(); });
    by.addEventListener("change", () => { explain(); show(); });
    find.addEventListener("input", () => { hovered = -1; under.textContent = ""; show(); });
    sheet.onload = show;
    sheet.src = map.sheet;
    redraws.push(() => { explain(); show(); });
    explain();
    canvas.closest("details")?.addEventListener("toggle", show);
  });

  const all = () => { draw(); redraws.forEach((one) => one()); };
  document.getElementById("axis")?.addEventListener("change", draw);
  document.getElementById("whole")?.addEventListener("click", draw);
  new ResizeObserver(() => {
    charts.forEach((chart) => {
      const width = chart.root.parentElement.clientWidth;
      if (width && width !== chart.width) chart.setSize({width, height: chart.height});
    });
    redraws.forEach((one) => one());
  }).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.print = "";
    document.querySelectorAll("details.run").forEach((one) => { one.open = true; });
    all();
  });
  addEventListener("afterprint", () => { delete document.documentElement.dataset.print; all(); });
  const open = () => { const target = location.hash && document.querySelector(location.hash.replace(/[^#\w]/g, "")); if (target && target.tagName === "DETAILS") target.open = true; };
  addEventListener("hashchange", open);
  open();
  draw();
  document.documentElement.dataset.ready = "";

  // Served by `sslvit watch`: load the page again when there are new lines.
  if (data.live) {
    setInterval(async () => {
      try {
        const now = await (await fetch("/stamp")).text();
        if (now !== data.live && !document.querySelector(":focus-within > input:focus")) location.reload();
      } catch { /* it has ended */ }
    }, 3000);
  }
})();
