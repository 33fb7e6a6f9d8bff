/* The page's controls: smoothing, axes, maps of layers, and reading itself again while the run goes on. */

const data = JSON.parse(document.getElementById("data").textContent);
const MINUTE = 60, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

/* What the reader chose, kept while the page reloads. A browser may refuse storage to a page from a file. */
const kept = {
  name: `dora_dist ${location.pathname}`,
  read() {
    try { return JSON.parse(sessionStorage.getItem(this.name)) || {}; } catch { return {}; }
  },
  write(changes) {
    try { sessionStorage.setItem(this.name, JSON.stringify({ ...this.read(), ...changes })); } catch { /* as said */ }
  },
};

const page = {
  smoothing: 0,
  last: extent([1, ...data.charts.flatMap((chart) => chart.curves).flatMap((curve) => curve.x)])[1],
  charts: [],
  chosen: (name) => ({ log: Boolean(kept.read().logs), ...(kept.read().charts || {})[name] }),
  choose(name, changes) {
    const charts = kept.read().charts || {};
    kept.write({ charts: { ...charts, [name]: { ...charts[name], ...changes } } });
  },
  pointAt(owner, step) {
    for (const chart of this.charts) chart.point(step, chart === owner);
  },
  draw() {
    for (const chart of this.charts) chart.draw();
  },
};

function addCharts() {
  const by = new Map(data.charts.map((chart) => [chart.name, chart]));
  for (const figure of document.querySelectorAll("[data-chart]"))
    page.charts.push(new Chart(figure, by.get(figure.dataset.chart), page));
  new ResizeObserver(() => page.charts.forEach((chart) => { if (chart.plot.clientWidth !== chart.width) chart.draw(); })).observe(document.body);
}

function addControls() {
  const noisy = data.charts.flatMap((chart) => chart.curves).filter((curve) => curve.style === "noisy");
  const smoothing = document.querySelector(".smoothing"), logs = document.querySelector(".all-log");
  const before = kept.read();
  /* Few points need none. */
  smoothing.value = before.smoothing ?? (Math.max(0, ...noisy.map((curve) => curve.x.length)) >= 40 ? 0.6 : 0);
  page.smoothing = +smoothing.value;
  smoothing.addEventListener("input", () => {
    page.smoothing = +smoothing.value;
    kept.write({ smoothing: page.smoothing });
    page.draw();
  });
  logs.addEventListener("change", () => {
    kept.write({ logs: logs.checked });
    for (const chart of page.charts) chart.setLog(logs.checked);
  });
  logs.checked = Boolean(before.logs);
  smoothing.parentElement.hidden = !noisy.length;
  logs.parentElement.hidden = !data.charts.some((chart) => chart.log);
  document.querySelector(".controls").hidden = false;
}

function addMaps() {
  const by = new Map(data.maps.map((map) => [map.name, map]));
  for (const figure of document.querySelectorAll("[data-map]")) {
    const label = figure.querySelector(".slider");
    if (!label) continue;
    const map = by.get(figure.dataset.map);
    const input = label.querySelector("input"), output = label.querySelector("output");
    const rows = [...figure.querySelectorAll("tbody tr")].map((row) => row.querySelectorAll("td"));
    const show = () => {
      const step = map.steps[+input.value].toLocaleString("en-US");
      output.value = step;
      input.setAttribute("aria-valuetext", `step ${step}`);
      figure.querySelector(".at").textContent = `after step ${step}`;
      rows.forEach((row, r) => row.forEach((cell, c) => {
        const shade = map.shades[+input.value][r][c];
        cell.textContent = map.written[+input.value][r][c];
        cell.className = shade === null ? "" : `h${shade}`;
      }));
    };
    label.hidden = false;
    input.addEventListener("input", () => {
      show();
      /* At the end it goes on with the run. */
      const step = input.value === input.max ? null : map.steps[+input.value];
      kept.write({ maps: { ...kept.read().maps, [map.name]: step } });
    });
    const before = map.steps.indexOf((kept.read().maps || {})[map.name]);
    if (before >= 0) {
      input.value = before;
      show();
    }
  }
}

function ago(seconds) {
  if (seconds < MINUTE) return `${Math.round(seconds)} s ago`;
  if (seconds < HOUR) return `${Math.round(seconds / MINUTE)} min ago`;
  return seconds < 2 * DAY ? `${Math.round(seconds / HOUR)} h ago` : `${Math.round(seconds / DAY)} days ago`;
}

/* While the run goes on the file is written again and again: read it again, but not under the reader's hands. */
function addReloading() {
  const written = document.querySelector(".written"), every = +written.dataset.reload;
  if (!every) return;
  const age = written.querySelector(".age"), button = written.querySelector(".pause");
  const loaded = Date.now();
  let paused = Boolean(kept.read().paused), busy = 0;
  const show = () => {
    const old = Date.now() / 1000 - +written.dataset.written;
    const silent = old > Math.max(10 * every, 15 * MINUTE);
    const what = silent ? "No news since: the run may have ended." : paused ? "Does not update itself now." : "Updates itself.";
    age.textContent = `Written ${ago(Math.max(old, 0))}. ${what}`;
    document.querySelector(".state").classList.toggle("stale", silent);
    button.textContent = paused ? "Update" : "Pause";
    button.setAttribute("aria-pressed", String(paused));
  };
  button.hidden = false;
  button.addEventListener("click", () => { paused = !paused; kept.write({ paused }); show(); });
  for (const kind of ["pointermove", "pointerdown", "keydown", "wheel", "touchmove"])
    addEventListener(kind, () => { busy = Date.now(); }, { passive: true });
  setInterval(() => {
    show();
    const waited = Date.now() - loaded > every * 1000, idle = Date.now() - busy > 5000;
    if (waited && idle && !paused && !document.hidden && !String(getSelection())) location.reload();
  }, 1000);
  show();
}

function keepOpen() {
  const all = [...document.querySelectorAll("details")], open = kept.read().open || [];
  const name = (details) => `${details.closest("figure, article, section").querySelector("h2, h3").textContent} ${details.className}`;
  for (const details of all) {
    if (open.includes(name(details))) details.open = true;
    details.addEventListener("toggle", () => kept.write({ open: all.filter((each) => each.open).map(name) }));
  }
}

addCharts();
addControls();
page.draw();
addMaps();
keepOpen();
addReloading();
