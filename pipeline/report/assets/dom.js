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

// A number between two others with `digits` digits goes to the even one, as in the terminal: 56.25 is 56.2. JavaScript says 56.3.
const rounded = (value, digits) => {
  const [, cut, rest] = value.toFixed(digits + 50).match(/^(.+?)\.?(\d{50})$/) ?? []; // from 1e21 on there is no such text
  return rest && /^50*$/.test(rest) && Number(cut.at(-1)) % 2 === 0 ? cut : value.toFixed(digits);
};
const fixed = (value, digits = 3) => {
  if (!known(value)) return "–";
  const text = rounded(value, digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−"); // nothing is shown as −0.000
};
const signed = (value, digits = 3) => (known(value) ? (value > 0 ? "+" : "") + fixed(value, digits) : "–");
const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–");
const percent = (value, digits = 1) => (known(value) ? `${rounded(100 * value, digits)} %` : "–");

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
    { class: `scroll ${options.tone ?? ""}`, tabindex: "0", role: "region", "aria-label": caption },
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

// A choice that the address names. Its field follows the address.
function bound(label, name, options, fallback = "", wide = false) {
  const field = choice(label, options, at[name] || fallback, (value) => go({ [name]: value }));
  if (wide) field.classList.add("wide");
  Object.assign(field.querySelector("select").dataset, { name, fallback });
  return field;
}

function followAddress(section) {
  for (const field of section.querySelectorAll("[data-name]"))
    if (field !== document.activeElement) field.value = at[field.dataset.name] || field.dataset.fallback || "";
}

// Draw anew what is below a node, and leave the focus on the field that had it.
function redraw(node, ...children) {
  const held = node.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  node.replaceChildren(...children.filter(Boolean));
  if (held) node.querySelector(`[data-name="${held}"]`)?.focus({ preventScroll: true });
}

// A list of buttons of which Tab reaches one: arrow keys, j and k move. `more` of them are added at a time.
const MORE = 60;
function pickList({ label, render, open, isOpen }) {
  const items = el("ol", { class: "items", "aria-label": label, onkeydown: moveInList });
  const found = el("p", { class: "found", role: "status" });
  const list = { items, found, rows: [], shown: MORE, last: null };
  list.fill = (rows, noun, note = "") => {
    const kept = rows.length === list.rows.length && rows.every((row, i) => row === list.rows[i]);
    Object.assign(list, { rows, shown: Math.max(kept ? list.shown : MORE, rows.findIndex(isOpen) + 1) });
    found.textContent = `${count(rows.length)} ${rows.length === 1 ? noun : `${noun}s`}${note}`;
    if (!kept || !items.children.length) list.draw();
    else list.mark();
  };
  list.draw = () => {
    const rest = list.rows.length - list.shown;
    items.replaceChildren(
      ...list.rows.slice(0, list.shown).map((row) =>
        el("li", {}, el("button", { type: "button", class: "item", tabindex: "-1", onclick: () => open(row) }, render(row))),
      ),
      ...(rest > 0
        ? [el("li", {}, el("button", { class: "more", type: "button", onclick: () => list.grow() }, `Show ${count(Math.min(rest, MORE))} more`))]
        : []),
    );
    list.mark();
  };
  list.grow = () => {
    const before = list.shown;
    list.shown += MORE;
    list.draw();
    items.children[before].querySelector("button").focus();
  };
  list.mark = () => {
    const buttons = [...items.querySelectorAll(".item")];
    buttons.forEach((button, i) => {
      const current = isOpen(list.rows[i]);
      if (current) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
      button.tabIndex = current ? 0 : -1;
    });
    if (!buttons.some((button) => button.tabIndex === 0) && buttons.length) buttons[0].tabIndex = 0;
    bring(items, buttons.find((button) => button.tabIndex === 0), list);
  };
  list.step = (by) => {
    const now = list.rows.findIndex(isOpen);
    const next = list.rows[now + by];
    if (!next) return;
    while (now + by >= list.shown) list.shown += MORE;
    open(next);
  };
  return list;
}

// Scroll a list to what is open, once for each thing that is opened, and leave the page where it is.
function bring(items, button, list) {
  const row = list.rows.find((_, i) => items.querySelectorAll(".item")[i] === button);
  if (!button || row === list.last) return;
  list.last = row;
  const { offsetTop, offsetHeight } = button;
  if (offsetTop < items.scrollTop || offsetTop + offsetHeight > items.scrollTop + items.clientHeight)
    items.scrollTop = offsetTop - items.clientHeight / 3;
}

function moveInList(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const next = buttons[buttons.indexOf(document.activeElement) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

const isPhone = () => matchMedia("(max-width: 760px)").matches;
const isTouched = () => matchMedia("(hover: none)").matches;

// A button that puts a sheet away. It is seen where the sheet lies over the text.
const closing = (sheet) =>
  el("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => sheet().classList.add("away") }, "✕");

// On a small screen the list stands above what it opens: bring that into view.
function reveal(node) {
  if (node && isPhone()) node.scrollIntoView({ block: "start" });
}

// A text that a model wrote, cut where the page had no room for more.
const whole = (text, most) => foreign(text.length >= most ? `${text} […]` : text);

const chip = (text, tone) => el("span", { class: `chip ${tone || ""}` }, text);
