// Puts the page together: what was run, what came of it, and the parts of the other files.

const ENDS = 0.1; // share of the steps that a number "at first" or "at last" is a mean over
const TILES = [ // title, metric, how it is written
  ["match", "reward/match", percent],
  ["match, hard tier", "match/hard", percent],
  ["thinking tokens", "length/thinking", shown],
  ["raw text, nats", "loss/ntp", (value) => value.toFixed(3)],
];

function drawRuns(place, data) {
  for (const run of data.runs) {
    const facts = Object.entries(run.facts).map(([name, value]) => {
      const plain = name.replaceAll("_", " ");
      return `${plain} ${String(value).split("/").pop()}`;
    });
    place.append(element("p.facts", element("strong", run.name), ` ${facts.join(" · ")}`));
  }
}

// Mean over the first and over the last steps of a metric.
function ends(points) {
  const few = Math.max(1, Math.round(ENDS * points.length));
  const mean = (list) => list.reduce((sum, point) => sum + point[1], 0) / list.length;
  return [mean(points.slice(0, few)), mean(points.slice(-few))];
}

function drawResult(place, data) {
  for (const run of data.runs) {
    if (data.runs.length > 1) place.append(element("h3", run.name));
    const tiles = TILES.filter(([, metric]) => run.series[metric]).map(([title, metric, write]) => {
      const [first, last] = ends(run.series[metric]);
      const change = [`${write(first)} → `, element("strong", write(last))];
      return element("div.tile", element("span.small", title), element("span.numbers", ...change));
    });
    place.append(element("div.tiles", ...tiles),
      note("In training: means of the first and of the last tenth of the steps."));
    if (Object.keys(run.evaluations).length) place.append(resultTable(run, data.tiers));
    const found = run.verdicts.join("; ");
    if (found) place.append(note(`After against before: ${found}.`));
  }
}

function resultTable(run, tiers) {
  const rows = Object.entries(run.evaluations);
  const measured = (tier) => rows.some(([, row]) => row[tier]?.n);
  const known = [...tiers, "average", "problems"].filter(measured);
  const names = ["held-out accuracy, 95 % interval", ...known, "thinking tokens"];
  const head = element("tr", ...names.map((name) => element("th", { scope: "col" }, name)));
  const body = rows.map(([name, row]) => element("tr",
    element("th", { scope: "row" }, name), ...known.map((tier) => accuracyCell(row[tier])),
    element("td", shown((row.average ?? row.problems)?.thinking_length))));
  return element("div.scroll", { tabindex: 0, role: "group", "aria-label": "Evaluations" },
    element("table", element("thead", head), element("tbody", ...body)));
}

// A percentage with its interval, in numbers and as a whisker between 0 and 100 %.
function accuracyCell(row) {
  if (!row?.n) return element("td", "–");
  const [low, high, at] = [row.low, row.high, row.accuracy].map((share) => 100 * share);
  return element("td", element("strong", percent(row.accuracy)),
    element("span.small", ` ${low.toFixed(1)}–${high.toFixed(1)}`),
    svg("svg.whisker", { viewBox: "0 0 100 8", "aria-hidden": "true" },
      svg("line.grid", { x1: 0, x2: 100, y1: 4, y2: 4 }),
      svg("line.spread", { x1: low, x2: high, y1: 4, y2: 4 }),
      svg("circle", { cx: at, cy: 4, r: 2.6 })));
}

// The system's colours until the button asks for the others; kept where the browser allows it.
function themeSwitch(button) {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const say = () => { button.textContent = dark() ? "Light colours" : "Dark colours"; };
  const kept = storage((store) => store.getItem("theme"));
  if (["dark", "light"].includes(kept)) root.dataset.theme = kept;
  button.addEventListener("click", () => {
    const wanted = dark() ? "light" : "dark";
    if (system.matches === (wanted === "dark")) { // the system's again
      delete root.dataset.theme;
      storage((store) => store.removeItem("theme"));
    } else {
      root.dataset.theme = wanted;
      storage((store) => store.setItem("theme", wanted));
    }
    say();
  });
  system.addEventListener("change", say);
  say();
}

function storage(use) {
  try { // a page opened as a file may have none
    return use(localStorage);
  } catch {
    return null;
  }
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const place = (name) => document.getElementById(name);
  document.title = `${data.runs.map((run) => run.name).join(", ")}: reinforcement mid-training`;
  themeSwitch(place("theme"));
  drawRuns(place("runs"), data);
  drawResult(place("result"), data);
  drawCurves(place("curves"), data);
  drawDocuments(place("documents"), data);
  drawSamples(place("samples"), data);
  document.documentElement.dataset.ready = Math.round(performance.now()); // ms since it was opened
}

start();
