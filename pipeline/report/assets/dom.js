// Functions that build elements from text nodes only, so that no text of a model becomes markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Text from outside the program. Its direction is isolated, and invisible characters are shown as their code points.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
const KEPT = "\n\t\u200c\u200d";
const visible = (text) =>
  String(text).replace(HIDDEN, (c) =>
    KEPT.includes(c) ? c : `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`,
  );
const foreign = (text) => el("bdi", {}, visible(text));

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const fixed = (value, digits = 3) => (known(value) ? value.toFixed(digits).replace("-", "−") : "–");
const signed = (value, digits = 3) => (known(value) ? (value > 0 ? "+" : "") + fixed(value, digits) : "–");
const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–");
const percent = (value, digits = 1) => (known(value) ? `${(100 * value).toFixed(digits)} %` : "–");

// A percentage on an axis, with no more digits than the steps of the axis need.
const percentTick = (value, step) => percent(value, step === undefined || step < 0.0099 ? 1 : 0);

// Three significant digits, whatever the size: 0.00012, 1.23, 456.
function short(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(1).replace("-", "−");
  if (size >= 100) return count(value);
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

// A table with a caption that screen readers announce. Cells are text or nodes. Numbers are aligned to the right.
function table(caption, head, rows, options = {}) {
  const cell = (tag, value, column) =>
    el(
      tag,
      { class: column > 0 && !options.words?.includes(column) ? "num" : null, scope: tag === "th" ? "col" : null },
      value,
    );
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el(
      "table",
      {},
      el("caption", { class: options.hideCaption ? "unseen" : null }, caption),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map((value, i) => cell("th", value, i)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            {},
            row.map((value, i) => (i ? cell("td", value, i) : el("th", { scope: "row" }, value))),
          ),
        ),
      ),
    ),
  );
}

function choice(label, options, value, change) {
  const select = el(
    "select",
    { onchange: (event) => change(event.target.value) },
    options.map(([key, text]) => el("option", { value: key, selected: key === value }, text)),
  );
  return el("label", { class: "field" }, el("span", {}, label), select);
}
