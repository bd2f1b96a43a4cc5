// Documents: tokens shaded by entropy. A probed position opens what was thought about it, by step.

function drawDocuments(place, data) {
  const runs = data.runs.filter((run) => run.documents.length);
  if (!runs.length) {
    place.append(note("No document was probed (--probe-documents)."));
    return;
  }
  const view = element("div");
  const open = (number) => view.replaceChildren(runDocuments(runs[number]));
  if (runs.length > 1) place.append(choices("Run", runs.map((run) => run.name), 0, open));
  place.append(view);
  open(0);
}

function runDocuments(run) {
  const entropies = run.documents.flatMap((doc) => doc.entropies);
  const highest = entropies.reduce((high, entropy) => Math.max(high, entropy ?? 0), 0) || 1;
  const view = element("div");
  const open = (number) => view.replaceChildren(documentView(run.documents[number], run, highest));
  open(0);
  const names = run.documents.map((_, number) => `Document ${number + 1}`);
  return element("div", choices("Document", names, 0, open), ramp(highest), view);
}

// What shades and marks mean.
function ramp(highest) {
  const gradient = element("span.gradient", { role: "img", "aria-label": "pale to deep" });
  const tier = (name) => element("span", element("span.letter", name[0]), ` ${name} tier`);
  return element("div.ramp",
    element("span", "entropy 0 ", gradient, ` ${shown(highest)} nats`),
    tier("easy"), tier("medium"), tier("hard"),
    element("span", element("span.token.drawn", "drawn"), " in a sample of training"),
    element("span", element("span.token.probed", "probed"), " at several steps: choose one"));
}

// Entries of a list by their position.
function byPosition(list) {
  const groups = new Map();
  for (const entry of list) {
    if (!groups.has(entry.position)) groups.set(entry.position, []);
    groups.get(entry.position).push(entry);
  }
  return groups;
}

function documentView(doc, run, highest) {
  const drawn = byPosition(run.samples.filter((sample) => sample.index === doc.index));
  const probes = byPosition(run.probes.filter((probe) => probe.document === doc.index));
  const answers = element("div.answers"), buttons = new Map();
  const open = (position, byHand) => {
    for (const [place, button] of buttons) press(button, place === position);
    answers.replaceChildren(answersView(position, probes.get(position)));
    if (byHand) answers.scrollIntoView({ block: "nearest" });
  };
  const nodes = doc.tokens.flatMap((text, position) => {
    const node = tokenNode(doc, position, highest, drawn.get(position), probes.has(position));
    if (!probes.has(position)) return [node];
    node.addEventListener("click", () => open(position, true));
    buttons.set(position, node);
    return text.includes("\n") ? [node, "\n"] : [node];
  });
  const hardest = [...probes.keys()].pop(); // probes come by tier
  if (probes.size) open(hardest, false);
  else answers.append(note("No position of it was probed: its tiers are empty."));
  const source = element("p.source", `${doc.source}, ${counted(doc.tokens.length, "token")}`);
  const text = element("div.text", { role: "group", "aria-label": "Text" }, ...nodes);
  return element("div.reader", element("div", source, text), answers);
}

function tokenNode(doc, position, highest, drawn, probed) {
  const text = doc.tokens[position], entropy = doc.entropies[position], tier = doc.tiers[position];
  const facts = [
    `position ${position}: ${quoted(text)}`,
    entropy === null ? "nothing before it" : `${entropy.toFixed(2)} nats`,
    tier ? `${tier} tier` : "no tier",
    ...(drawn ? [`in ${counted(drawn.length, "sample")} of training`] : []),
  ].join(", ");
  const look = {
    title: facts, "data-mark": tier ? tier[0] : null,
    style: `--heat:${Math.min(1, (entropy ?? 0) / highest).toFixed(3)}`,
  };
  const kind = `token${drawn ? ".drawn" : ""}`;
  if (!probed) return element(`span.${kind}`, look, text.replaceAll("\n", "↵\n"));
  return element(`button.${kind}.probed`, {
    ...look, type: "button", "aria-pressed": "false", "data-position": position,
    "aria-label": `probed ${facts}`,
  }, text.replaceAll("\n", "↵"));
}

function answersView(position, records) {
  const steps = [...records].sort((a, b) => a.step - b.step);
  const lengths = steps.flatMap((step) => [step.budget ?? 0, ...step.rollouts.map(lengthOf)]);
  const longest = Math.max(1, ...lengths);
  const rollouts = element("div.rollouts");
  const columns = steps.map((step, number) => stepColumn(step, longest, () => open(number)));
  const open = (number) => {
    columns.forEach((column, place) => press(column, place === number));
    const step = steps[number];
    rollouts.replaceChildren(...step.rollouts.map((said) => rolloutCard(said, step.budget)));
  };
  open(steps.length - 1);
  const { tier, truth } = steps[0];
  const title = `Position ${position}, ${tier}: the next token is ${quoted(truth)}`;
  return element("div",
    element("h3", { "aria-live": "polite" }, title),
    note("A bar is the thinking length of a response: filled, it was right; hollow, wrong; dotted, "
      + "its thinking had no end. The upright line is the budget. Choose a step to read it."),
    element("div.columns", { role: "group", "aria-label": "Steps" }, ...columns),
    rollouts);
}

// Thinking tokens; of a response that never ends its thinking, all of them.
function lengthOf(rollout) {
  return rollout.thinking_length ?? rollout.tokens;
}

// Some templates leave it to the model to open its thinking.
function spoken(thought) {
  return thought.trim().replace(/^<think>\s*/, "");
}

function stepColumn(record, longest, choose) {
  const wide = (length) => ({ style: `--wide:${(100 * length / longest).toFixed(1)}%` });
  const bars = record.rollouts.map((said) => {
    const ended = said.match ? "right" : "wrong";
    const kind = said.thinking_length === null ? "endless" : ended;
    return element(`span.length.${kind}`, wide(lengthOf(said)));
  });
  if (record.budget !== null) bars.push(element("span.budget", wide(record.budget)));
  const ended = record.rollouts.map((r) => r.thinking_length).filter((length) => length !== null);
  const mean = ended.length ? ended.reduce((a, b) => a + b, 0) / ended.length : null;
  const right = record.rollouts.filter((said) => said.match).length;
  const look = { type: "button", "aria-pressed": "false", "data-step": record.step };
  return element("button.column", { ...look, onclick: choose },
    element("strong", `step ${record.step}`),
    element("span.small", record.budget === null ? "no budget" : `budget ${record.budget}`),
    element("span.bars", { "aria-hidden": "true" }, ...bars),
    element("span.small", `thinks ${shown(mean)}`),
    element("span.small", `${right} of ${record.rollouts.length} right`));
}

function rolloutCard(said, budget) {
  const fact = (name, value) => element("div", element("dt", name), element("dd", value));
  const length = said.thinking_length === null ? "no end" : String(said.thinking_length);
  const thought = { tabindex: 0, role: "group", "aria-label": "Thought" };
  return element(`article.rollout.${said.match ? "right" : "wrong"}`,
    element("p.verdict", element("strong", said.match ? "✓ match" : "✗ no match"),
      " predicted ", element("code", quoted(said.answer))),
    element("dl",
      fact("thinking", budget === null ? length : `${length} of ${budget}`),
      fact("length reward", said.length_reward.toFixed(2)),
      fact("reward", said.total.toFixed(2)),
      fact("advantage", signed(said.advantage))),
    element("div.thought", thought, spoken(said.thought) || "(no thought)"));
}
