"use strict";
// Elements without markup: what a model wrote only ever becomes a text node.

// element("p.hint", { title: "why" }, "text", child); attributes may be left out.
function element(kind, ...rest) {
  const [tag, ...classes] = kind.split(".");
  return furnish(document.createElement(tag), classes, rest);
}

function svg(kind, ...rest) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return furnish(node, classes, rest);
}

function furnish(node, classes, [attributes, ...children]) {
  if (classes.length) node.setAttribute("class", classes.join(" "));
  if (typeof attributes === "string" || attributes instanceof Node) {
    node.append(attributes);
    attributes = {};
  }
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function note(text) {
  return element("p.hint", text);
}

function press(button, pressed) {
  button.setAttribute("aria-pressed", String(pressed));
}

// One of several buttons is pressed; `choose` gets its number.
function choices(label, names, chosen, choose) {
  const buttons = names.map((name, number) => element("button", {
    type: "button", "aria-pressed": String(number === chosen),
    onclick: () => {
      buttons.forEach((other, place) => press(other, place === number));
      choose(number);
    },
  }, name));
  return element("div.choices", { role: "group", "aria-label": label }, ...buttons);
}

// Three digits, or all before the point.
function shown(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(+value.toPrecision(3));
}

function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`;
}

function signed(value) {
  return (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
}

// A token between quotation marks, with what would not be seen spelled out.
function quoted(text) {
  if (text === null || text === undefined) return "no answer";
  return `‘${text.replaceAll("\n", "\\n").replaceAll("\t", "\\t")}’`;
}

function counted(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}
