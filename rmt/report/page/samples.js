// The rollouts of samples.jsonl: filtered at once, drawn a screenful at a time.

const CHUNK = 40; // samples that are drawn together
const VERDICTS = {
  right: (sample) => sample.reward.match > 0,
  wrong: (sample) => !sample.reward.match && sample.answer !== null,
  "no answer": (sample) => sample.answer === null,
};

function drawSamples(place, data) {
  const of = (run) => run.samples.map((sample) => ({ run: run.name, ...sample }));
  const all = data.runs.flatMap(of);
  if (!all.length) {
    place.append(note("No sample was kept (--samples-per-step)."));
    return;
  }
  const count = element("p.hint", { "aria-live": "polite" }), list = element("div.list");
  const more = element("button.more", { type: "button", onclick: () => extend() }, "Show more");
  let matching = [], drawn = 0;
  const extend = () => {
    const next = matching.slice(drawn, drawn + CHUNK);
    list.append(...next.map((sample) => sampleItem(sample, data.runs.length > 1)));
    drawn += next.length;
    more.hidden = drawn >= matching.length;
  };
  const filter = filterForm(all, data.runs.map((run) => run.name), (keeps) => {
    matching = all.filter(keeps);
    drawn = 0;
    list.replaceChildren();
    const few = matching.length.toLocaleString("en");
    count.textContent = `${few} of ${counted(all.length, "sample")}`;
    extend();
  });
  place.append(filter, count, list, more);
  const reached = (entries) => entries.some((entry) => entry.isIntersecting) && extend();
  new IntersectionObserver(reached).observe(more);
}

// `changed` gets the function that says which samples to keep, now and after every change.
function filterForm(all, names, changed) {
  const steps = all.map((sample) => sample.step);
  const min = steps.reduce((a, b) => Math.min(a, b)), max = steps.reduce((a, b) => Math.max(a, b));
  const option = (value) => element("option", { value }, value);
  const select = (values) => element("select", ...["all", ...values].map(option));
  const number = (value) => element("input", { type: "number", min, max, value });
  const run = select(names), tier = select([...new Set(all.map((sample) => sample.tier))]);
  const answer = select(Object.keys(VERDICTS)), from = number(min), to = number(max);
  const told = () => {
    const first = from.value === "" ? min : Number(from.value);
    const last = to.value === "" ? max : Number(to.value);
    changed((sample) => sample.step >= first && sample.step <= last
      && ["all", sample.run].includes(run.value)
      && ["all", sample.tier].includes(tier.value)
      && (answer.value === "all" || VERDICTS[answer.value](sample)));
  };
  const field = (name, control) => element("label", name, control);
  told();
  return element("form.filter", { oninput: told, onsubmit: (event) => event.preventDefault() },
    names.length > 1 ? field("run", run) : null, field("tier", tier), field("answer", answer),
    field("from step", from), field("to step", to));
}

// One line; the texts are made when it is opened.
function sampleItem(sample, named) {
  const right = sample.reward.match > 0;
  const length = sample.thinking_length === null ? "no end" : sample.thinking_length;
  const asked = sample.budget === null ? "" : ` of ${sample.budget}`;
  const item = element("details", element("summary",
    element("span.small", `${named ? `${sample.run}, ` : ""}step ${sample.step}`),
    element("span.small", sample.tier),
    element("code", quoted(sample.truth)),
    element(right ? "span.yes" : "span.no",
      right ? "✓ " : "✗ ", element("code", quoted(sample.answer))),
    element("span.small", `thinking ${length}${asked}`),
    element("span.small", `reward ${sample.reward.total.toFixed(2)}`)));
  item.addEventListener("toggle", () => item.append(
    element("p.source", `${sample.document}, position ${sample.position}`),
    element("p.thought", `… ${sample.context}`, element("mark", sample.truth)),
    element("p.thought", sample.response)), { once: true });
  return item;
}
