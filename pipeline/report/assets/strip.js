// Curves aligned under the tokens of a page, and an overview of a long trace.

const LANES = { text: [0, 26], entropy: [34, 124], logprob: [140, 220], weight: [236, 296] };
const STRIP_HEIGHT = 316;

const DEEPEST = -8; // a log-prob below is drawn at the edge, as a triangle with its value

function stripOf(trace, signals, first, last, normaliser) {
  const n = last - first;
  const widest = Array.from({ length: n }, (_, k) => tokenText(signals.tokens[first + k]).shown.trim().length).sort(
    (a, b) => a - b,
  );
  const column = Math.min(72, Math.max(20, 8 * (widest[Math.floor(0.9 * (n - 1))] || 1) + 8));
  const width = n * column;
  const lane =
    ([top, bottom], low, high) =>
    (value) =>
      bottom - ((Math.min(Math.max(value, low), high) - low) / (high - low || 1)) * (bottom - top);
  let [lowest, heaviest] = [-0.5, 1e-6]; // the least scales that are drawn
  for (let i = first; i < last; i += 1) {
    lowest = Math.min(lowest, signals.student[i], signals.teacher[i]);
    heaviest = Math.max(heaviest, Math.abs(signals.weight[i]));
  }
  lowest = Math.max(lowest, DEEPEST);
  const entropy = lane(LANES.entropy, 0, normaliser);
  const logprob = lane(LANES.logprob, lowest, 0);
  const weight = lane(LANES.weight, -heaviest, heaviest);
  const middle = (i) => (i - first + 0.5) * column;
  const steps = (values, y) => {
    let path = "";
    for (let i = first; i < last; i += 1)
      path += `${i === first ? "M" : "L"}${(i - first) * column} ${y(values[i]).toFixed(1)}H${(i - first + 1) * column}`;
    return path;
  };
  const line = (values, y) =>
    Array.from({ length: n }, (_, k) => `${k ? "L" : "M"}${middle(first + k)} ${y(values[first + k]).toFixed(1)}`).join(
      "",
    );
  const cursor = svg("rect", { class: "column", y: 0, width: column, height: STRIP_HEIGHT, x: -column });
  const marks = [];
  for (let i = first; i < last; i += 1) {
    const shown = tokenText(signals.tokens[i]).shown.trim() || "␣";
    const room = Math.max(1, Math.floor((column - 2) / 7.6));
    marks.push(
      svg(
        "text",
        { class: "glyph", x: middle(i), y: 18, "text-anchor": "middle" },
        [...shown].length > room ? `${[...shown].slice(0, room - 1).join("")}…` : shown,
      ),
    );
    const top = weight(Math.max(0, signals.weight[i]));
    marks.push(
      svg("rect", {
        class: `bar ${signals.weight[i] < 0 ? "down" : "up"}`,
        x: (i - first) * column + column * 0.2,
        width: column * 0.6,
        y: top,
        height: Math.max(0.5, weight(Math.min(0, signals.weight[i])) - top),
      }),
    );
    if ((i - first) % 5 === 0)
      marks.push(svg("text", { class: "tick", x: middle(i), y: STRIP_HEIGHT - 6, "text-anchor": "middle" }, i));
  }
  for (let i = first; i < last; i += 1)
    for (const [name, side] of [
      ["student", -1],
      ["teacher", 1],
    ])
      if (signals[name][i] < lowest) {
        const [x, y] = [middle(i) + side * Math.min(6, column / 4), LANES.logprob[1]];
        marks.push(
          svg("path", { class: `beyond ${name}`, d: `M${x - 4} ${y - 6}h8l-4 7z` }),
          svg("text", { class: "tick beyond", x, y: y + 11, "text-anchor": "middle" }, fixed(signals[name][i], 0)),
        );
      }
  const base = (y) => svg("line", { class: "base", x1: 0, x2: width, y1: y, y2: y });
  const drawing = svg(
    "svg",
    { width, height: STRIP_HEIGHT, viewBox: `0 0 ${width} ${STRIP_HEIGHT}`, "aria-hidden": "true", focusable: "false" },
    cursor,
    base(LANES.entropy[1]),
    base(LANES.logprob[0]),
    base(weight(0)),
    svg("path", { class: "area entropy", d: `${steps(signals.entropy, entropy)}V${LANES.entropy[1]}H0Z` }),
    svg("path", { class: "line entropy", d: steps(signals.entropy, entropy) }),
    svg("path", { class: "line ahead", d: steps(signals.ahead, entropy) }),
    svg("path", { class: "line teacher", d: line(signals.teacher, logprob) }),
    svg("path", { class: "line student", d: line(signals.student, logprob) }),
    n <= 120
      ? Array.from({ length: n }, (_, k) => [
          svg("circle", {
            class: "dot student",
            cx: middle(first + k),
            cy: logprob(signals.student[first + k]),
            r: 2.4,
          }),
          svg("circle", {
            class: "dot teacher",
            cx: middle(first + k),
            cy: logprob(signals.teacher[first + k]),
            r: 2.4,
          }),
        ])
      : null,
    marks,
  );
  const under = (event) => first + Math.floor((event.clientX - drawing.getBoundingClientRect().left) / column);
  const inside = (i) => i >= first && i < last;
  const scroller = el(
    "div",
    {
      class: "strip",
      onpointermove: (event) => inside(under(event)) && select(under(event), { still: true }),
      onpointerleave: () => reader.pinned !== null && select(reader.pinned, { still: true }),
      onclick: (event) => inside(under(event)) && openHash(trace, under(event)),
    },
    drawing,
  );
  Object.assign(reader, { cursor, strip: scroller, column });
  const axis = svg(
    "svg",
    { class: "yaxis", width: 52, height: STRIP_HEIGHT, viewBox: `0 0 52 ${STRIP_HEIGHT}`, "aria-hidden": "true" },
    [
      [entropy, [0, normaliser / 2, normaliser]],
      [logprob, [0, lowest / 2, lowest]],
      [weight, heaviest > 1e-6 ? [-heaviest, 0, heaviest] : [0]],
    ].map(([y, values]) =>
      values.map((value) => [
        svg("line", { class: "base", x1: 47, x2: 52, y1: y(value), y2: y(value) }),
        svg("text", { class: "tick", x: 45, y: y(value) + 4, "text-anchor": "end" }, short(value)),
      ]),
    ),
  );
  const key = (tone, text) =>
    el(
      "span",
      { class: `key ${tone}` },
      svg(
        "svg",
        { viewBox: "0 0 22 10", "aria-hidden": "true" },
        svg("line", { class: `line ${tone}`, x1: 1, x2: 21, y1: 5, y2: 5 }),
      ),
      text,
    );
  return el(
    "figure",
    { class: "score" },
    el(
      "figcaption",
      { class: "keys" },
      el(
        "span",
        {},
        el("b", {}, "Entropy"),
        ` 0 to ${fixed(normaliser, 2)} nats`,
        key("entropy", "at the token"),
        key("ahead", `lowest up to ${DATA.window} tokens ahead`),
      ),
      el(
        "span",
        {},
        el("b", {}, "Log-prob"),
        ` 0 to ${fixed(lowest, 1)}${lowest === DEEPEST ? "; ▾ is lower" : ""}`,
        key("student", "student"),
        key("teacher", "teacher"),
      ),
      el("span", {}, el("b", {}, "Token weight"), heaviest > 1e-6 ? ` ±${fixed(heaviest, 2)}` : " 0 everywhere: this trace has no advantage"),
    ),
    el("div", { class: "drawn" }, axis, scroller),
  );
}

// An overview of a long trace: the highest entropy in each bin. A click or the buttons open another page.
function overview(trace, signals, page, normaliser) {
  const pages = Math.ceil(signals.tokens.length / PAGE);
  const bins = Math.min(400, signals.tokens.length);
  const size = signals.tokens.length / bins;
  let path = "M0 40";
  for (let b = 0; b < bins; b += 1) {
    let high = 0;
    for (let i = Math.floor(b * size); i < Math.floor((b + 1) * size); i += 1)
      high = Math.max(high, signals.entropy[i]);
    path += `L${b} ${(40 - 38 * Math.min(1, high / normaliser)).toFixed(1)}`;
  }
  const turn = (to) => to >= 0 && to < pages && openHash(trace, to * PAGE);
  const drawing = svg(
    "svg",
    {
      viewBox: `0 0 ${bins} 40`,
      preserveAspectRatio: "none",
      "aria-hidden": "true",
      onclick: (e) => turn(Math.floor((e.offsetX / drawing.getBoundingClientRect().width) * pages)),
    },
    svg("rect", { class: "column", x: (page * PAGE) / size, width: Math.max(2, PAGE / size), y: 0, height: 40 }),
    svg("path", { class: "area entropy", d: `${path}L${bins} 40Z` }),
  );
  return el(
    "div",
    { class: "overview" },
    drawing,
    el(
      "p",
      { class: "turn" },
      el("button", { type: "button", "data-turn": "earlier", disabled: page === 0, onclick: () => turn(page - 1) }, "← Earlier"),
      el("span", {}, `page ${page + 1} of ${pages}, ${count(PAGE)} tokens each`),
      el("button", { type: "button", "data-turn": "later", disabled: page + 1 >= pages, onclick: () => turn(page + 1) }, "Later →"),
    ),
  );
}
