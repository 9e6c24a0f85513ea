// One trace: its text, the curves aligned under every token, and what is known of the token at hand.

const PAGE = 600; // tokens on screen at one time; a trace of 100 000 has pages
const reader = { trace: null, page: 0, token: null, pinned: null, spans: [], cursor: null, strip: null, column: 20 };

function openTrace(trace, token) {
  const fresh = reader.trace !== trace;
  const signals = signalsOf(trace);
  const at = token === null ? null : Math.min(Math.max(token, 0), signals.tokens.length - 1);
  const page = Math.floor((at ?? 0) / PAGE);
  if (fresh || page !== reader.page || !reader.spans.length) drawReader(trace, page);
  view.trace = trace;
  for (const button of document.querySelectorAll(".item")) {
    if (button.dataset.id === trace.id) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  if (at !== null) select(at, { pin: true, scroll: true });
  else select(firstOfInterest(trace, page), { pin: false, scroll: false });
}

// Where to look first: the pivot with the highest entropy on the page, else its most uncertain token.
function firstOfInterest(trace, page) {
  const { regime, entropy } = signalsOf(trace);
  let best = page * PAGE;
  const worth = (i) => entropy[i] + (regime[i] === 2 ? 100 : 0);
  for (let i = best; i < Math.min(entropy.length, (page + 1) * PAGE); i += 1) if (worth(i) > worth(best)) best = i;
  return best;
}

function drawReader(trace, page) {
  const root = document.getElementById("reader");
  const signals = signalsOf(trace);
  const first = page * PAGE;
  const last = Math.min(first + PAGE, signals.tokens.length);
  Object.assign(reader, { trace, page, token: null, pinned: null, spans: [] });
  const verdict = VERDICTS[trace.verdict] || { glyph: "?", tone: "dim" };
  const text = el("div", {
    class: "text",
    id: "tokens",
    role: "listbox",
    tabindex: "0",
    "aria-label": `Tokens ${first} to ${last - 1} of ${signals.tokens.length}. Left and right arrows move, P and F go to the next pivot or fork, Enter links to the token.`,
    onkeydown: tokenKeys,
    onpointerover: (event) => hover(event.target.closest(".tok")),
    onclick: (event) => {
      const token = event.target.closest(".tok");
      if (token) openHash(trace, Number(token.dataset.i));
    },
    onpointerleave: () => reader.pinned !== null && select(reader.pinned, {}),
  });
  text.append(...tokenRuns(trace, signals, first, last));
  const detail = el("aside", { class: "inspector card", id: "inspector", "aria-label": "Token" });
  root.replaceChildren(
    el(
      "article",
      { class: "card trace" },
      el(
        "header",
        {},
        el("p", { class: "eyebrow" }, `Round ${trace.round} · policy ${trace.policy} · sample ${trace.sample} · written by the ${trace.source}`),
        el("h2", {}, foreign(trace.problem)),
        el(
          "p",
          { class: "chips" },
          el("span", { class: `chip ${verdict.tone}` }, `${verdict.glyph} ${trace.verdict}`),
          el("span", { class: "chip" }, "answer ", foreign(trace.answer)),
          el("span", { class: "chip" }, `reward ${fixed(trace.reward, 2)}`),
          el("span", { class: "chip" }, `advantage ${signed(trace.advantage, 2)}`),
          el("span", { class: "chip" }, `${count(trace.length)} tokens, ended by ${trace.finish}`),
          el("span", { class: "chip" }, `${trace.pivots} pivots, ${trace.forks} forks`),
        ),
      ),
      signals.tokens.length > PAGE ? overview(trace, signals, page) : null,
      text,
      legend(),
      stripOf(trace, signals, first, last),
      below(trace, signals, first, last),
      el(
        "p",
        { class: "turn" },
        el("button", { type: "button", onclick: () => neighbour(-1) }, "← Previous trace"),
        el("button", { type: "button", onclick: () => neighbour(1) }, "Next trace →"),
      ),
    ),
    detail,
  );
}

// Runs of one regime share an underline; the first token of a run bears its letter.
function tokenRuns(trace, signals, first, last) {
  const found = [];
  let start = first;
  while (start < last) {
    const code = signals.regime[start];
    let end = start + 1;
    while (end < last && signals.regime[end] === code) end += 1;
    const run = el("span", { class: `run ${REGIMES[code].name}` });
    for (let i = start; i < end; i += 1) {
      const { shown, kind, breaks } = tokenText(signals.tokens[i]);
      const heat = Math.round(10 * Math.sqrt(Math.min(1, signals.entropy[i] / trace.peak)));
      const token = el(
        "span",
        {
          class: `tok h${heat} ${kind}`,
          role: "option",
          id: `tok-${i}`,
          "data-i": i,
          "data-letter": i === start ? REGIMES[code].letter : null,
          "aria-selected": "false",
          "aria-label": `${i}: ${shown.trim() || "space"}, ${REGIMES[code].name}, entropy ${fixed(signals.entropy[i], 2)}`,
        },
        shown,
      );
      reader.spans[i - first] = token;
      run.append(token);
      if (breaks) run.append(el("br"));
    }
    found.push(run);
    start = end;
  }
  return found;
}

function tokenText(word) {
  const text = DATA.sample.vocabulary[word];
  const kind = { t: "plain", s: "special", b: "bytes" }[DATA.sample.kinds[word]];
  if (kind === "bytes") return { shown: `‹${text}›`, kind, breaks: false };
  if (!text) return { shown: "∅", kind: "bytes", breaks: false };
  const shown = visible(text).replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return { shown, kind, breaks: text.includes("\n") };
}

function legend() {
  const name = (r) => el("li", {}, el("span", { class: `run ${r.name}` }, el("span", { class: "tok", "data-letter": r.letter }, r.name)), el("span", { class: "soft" }, r.text));
  const tint = el("span", { class: "ramp", "aria-hidden": "true" }, [0, 2, 4, 6, 8, 10].map((h) => el("i", { class: `h${h}` })));
  return el("ul", { class: "legend marks" }, REGIMES.map(name), el("li", {}, tint, el("span", { class: "soft" }, "tint: teacher entropy, up to the round's maximum")));
}

// ---- aligned curves ----------------------------------------------------------------------------------------------------

const LANES = { text: [0, 26], entropy: [34, 124], logprob: [140, 220], weight: [236, 296] };
const STRIP_HEIGHT = 316;

function stripOf(trace, signals, first, last) {
  const n = last - first;
  const widest = Array.from({ length: n }, (_, k) => tokenText(signals.tokens[first + k]).shown.trim().length).sort((a, b) => a - b);
  const column = Math.min(72, Math.max(20, 8 * (widest[Math.floor(0.9 * (n - 1))] || 1) + 8));
  const width = n * column;
  const lane = ([top, bottom], low, high) => (value) => bottom - ((Math.min(Math.max(value, low), high) - low) / (high - low || 1)) * (bottom - top);
  let [lowest, heaviest] = [-0.5, 1e-6];
  for (let i = first; i < last; i += 1) {
    lowest = Math.min(lowest, signals.student[i], signals.teacher[i]);
    heaviest = Math.max(heaviest, Math.abs(signals.weight[i]));
  }
  lowest = Math.max(lowest, -8);
  const entropy = lane(LANES.entropy, 0, trace.peak);
  const logprob = lane(LANES.logprob, lowest, 0);
  const weight = lane(LANES.weight, -heaviest, heaviest);
  const middle = (i) => (i - first + 0.5) * column;
  const steps = (values, y) => {
    let path = "";
    for (let i = first; i < last; i += 1) path += `${i === first ? "M" : "L"}${(i - first) * column} ${y(values[i]).toFixed(1)}H${(i - first + 1) * column}`;
    return path;
  };
  const line = (values, y) => Array.from({ length: n }, (_, k) => `${k ? "L" : "M"}${middle(first + k)} ${y(values[first + k]).toFixed(1)}`).join("");
  const cursor = svg("rect", { class: "column", y: 0, width: column, height: STRIP_HEIGHT, x: -column });
  const marks = [];
  for (let i = first; i < last; i += 1) {
    const shown = tokenText(signals.tokens[i]).shown.trim() || "␣";
    const room = Math.max(1, Math.floor((column - 2) / 7.6));
    marks.push(svg("text", { class: "glyph", x: middle(i), y: 18, "text-anchor": "middle" }, [...shown].length > room ? `${[...shown].slice(0, room - 1).join("")}…` : shown));
    const top = weight(Math.max(0, signals.weight[i]));
    marks.push(svg("rect", { class: `bar ${signals.weight[i] < 0 ? "down" : "up"}`, x: (i - first) * column + column * 0.2, width: column * 0.6, y: top, height: Math.max(0.5, weight(Math.min(0, signals.weight[i])) - top) }));
    if ((i - first) % 5 === 0) marks.push(svg("text", { class: "tick", x: middle(i), y: STRIP_HEIGHT - 6, "text-anchor": "middle" }, i));
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
    n <= 120 ? Array.from({ length: n }, (_, k) => [svg("circle", { class: "dot student", cx: middle(first + k), cy: logprob(signals.student[first + k]), r: 2.4 }), svg("circle", { class: "dot teacher", cx: middle(first + k), cy: logprob(signals.teacher[first + k]), r: 2.4 })]) : null,
    marks,
  );
  const at = (event) => first + Math.floor((event.clientX - drawing.getBoundingClientRect().left) / column);
  const inside = (i) => i >= first && i < last;
  const scroller = el(
    "div",
    {
      class: "strip",
      onpointermove: (event) => inside(at(event)) && select(at(event), { still: true }),
      onpointerleave: () => reader.pinned !== null && select(reader.pinned, { still: true }),
      onclick: (event) => inside(at(event)) && openHash(trace, at(event)),
    },
    drawing,
  );
  Object.assign(reader, { cursor, strip: scroller, column });
  const label = (top, name, tone, note) => el("p", { class: `lane ${tone}` }, el("b", {}, name), note ? el("span", {}, note) : null);
  const key = (tone, text) => el("span", { class: `key ${tone}` }, svg("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, svg("line", { class: `line ${tone}`, x1: 1, x2: 21, y1: 5, y2: 5 })), text);
  return el(
    "figure",
    { class: "score" },
    el(
      "figcaption",
      { class: "keys" },
      el("span", {}, el("b", {}, "Entropy"), ` 0 to ${fixed(trace.peak, 2)} nats`, key("entropy", "at the token"), key("ahead", `least of the next ${DATA.labels.window}`)),
      el("span", {}, el("b", {}, "Log-prob"), ` 0 to ${fixed(lowest, 1)}`, key("student", "student"), key("teacher", "teacher")),
      el("span", {}, el("b", {}, "Token weight"), ` ±${fixed(heaviest, 2)}`),
    ),
    scroller,
  );
}

// The whole of a long trace: the highest entropy in each bin; a click or the arrows turn to that page.
function overview(trace, signals, page) {
  const pages = Math.ceil(signals.tokens.length / PAGE);
  const bins = Math.min(400, signals.tokens.length);
  const size = signals.tokens.length / bins;
  let path = "M0 40";
  for (let b = 0; b < bins; b += 1) {
    let high = 0;
    for (let i = Math.floor(b * size); i < Math.floor((b + 1) * size); i += 1) high = Math.max(high, signals.entropy[i]);
    path += `L${b} ${(40 - 38 * Math.min(1, high / trace.peak)).toFixed(1)}`;
  }
  const turn = (to) => to >= 0 && to < pages && openHash(trace, to * PAGE);
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${bins} 40`, preserveAspectRatio: "none", "aria-hidden": "true", onclick: (e) => turn(Math.floor((e.offsetX / drawing.getBoundingClientRect().width) * pages)) },
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
      el("button", { type: "button", disabled: page === 0, onclick: () => turn(page - 1) }, "← Earlier"),
      el("span", {}, `page ${page + 1} of ${pages}, ${count(PAGE)} tokens each`),
      el("button", { type: "button", disabled: page + 1 >= pages, onclick: () => turn(page + 1) }, "Later →"),
    ),
  );
}

function below(trace, signals, first, last) {
  const cut = (text) => (text.length >= 20000 ? `${text} […]` : text);
  const rows = el("details", { class: "below", ontoggle: (event) => event.target.open && event.target.children.length === 1 && event.target.append(tokenTable(trace, signals, first, last)) }, el("summary", {}, "Tokens as a table"));
  return [
    el("details", { class: "below" }, el("summary", {}, "Plain response"), el("pre", {}, foreign(cut(trace.text)))),
    el("details", { class: "below" }, el("summary", {}, "Reference solution"), el("pre", {}, foreign(cut(trace.solution)))),
    rows,
  ];
}

function tokenTable(trace, signals, first, last) {
  const rows = [];
  for (let i = first; i < last; i += 1) {
    const more = derived(trace, signals, i);
    rows.push([String(i), foreign(tokenText(signals.tokens[i]).shown), REGIMES[signals.regime[i]].name, fixed(signals.entropy[i]), fixed(signals.ahead[i]), fixed(signals.student[i]), fixed(signals.teacher[i]), fixed(more.magnitude, 2), fixed(signals.gate[i]), signed(more.restored), signed(signals.weight[i])]);
  }
  return table("Tokens", ["#", "token", "regime", "entropy", "lookahead", "log p student", "log p teacher", "magnitude", "gate", "restored", "weight"], rows, { hideCaption: true, words: [1, 2] });
}

// ---- the token at hand -------------------------------------------------------------------------------------------------

function hover(token) {
  if (token) select(Number(token.dataset.i), {});
}

// Show token i. pin: it stays when the pointer leaves; scroll: bring it into view; still: leave the strip where it is.
function select(i, { pin, scroll, still }) {
  const first = reader.page * PAGE;
  const token = reader.spans[i - first];
  if (!token) return;
  if (pin) {
    if (reader.pinned !== null) reader.spans[reader.pinned - first]?.classList.remove("pinned");
    reader.pinned = i;
    token.classList.add("pinned");
  }
  if (reader.token !== null) {
    const old = reader.spans[reader.token - first];
    old?.classList.remove("at");
    old?.setAttribute("aria-selected", "false");
  }
  reader.token = i;
  token.classList.add("at");
  token.setAttribute("aria-selected", "true");
  document.getElementById("tokens").setAttribute("aria-activedescendant", token.id);
  if (scroll) token.scrollIntoView({ block: "nearest" });
  reader.cursor.setAttribute("x", (i - first) * reader.column);
  if (!still) {
    const x = (i - first + 0.5) * reader.column;
    const { scrollLeft, clientWidth } = reader.strip;
    if (x < scrollLeft + 30 || x > scrollLeft + clientWidth - 30) reader.strip.scrollLeft = x - clientWidth / 2;
  }
  inspect(reader.trace, signalsOf(reader.trace), i);
}

function inspect(trace, signals, i) {
  const regime = REGIMES[signals.regime[i]];
  const more = derived(trace, signals, i);
  const { shown, kind } = tokenText(signals.tokens[i]);
  const row = (name, value, tone) => [el("dt", { class: tone || null }, name), el("dd", {}, value)];
  const meter = (value) => svg("svg", { class: "meter", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { class: "track", width: 100, height: 4 }), svg("rect", { class: "fill", width: 100 * Math.min(1, Math.max(0, value)), height: 4 }));
  document.getElementById("inspector").replaceChildren(
    el("div", { class: "head" }, el("p", { class: "eyebrow" }, `Token ${i} of ${signals.tokens.length}${kind === "plain" ? "" : kind === "special" ? ", special" : ", bytes that are no text"}`),
    el("p", { class: "big" }, foreign(shown.replace(/ /g, "␣"))),
    el("p", { class: "regime" }, el("span", { class: `badge ${regime.name}` }, regime.letter), el("span", {}, el("b", {}, regime.name), el("span", { class: "why" }, ` ${regime.text}`)))),
    el(
      "dl",
      {},
      row("entropy, nats", fixed(signals.entropy[i]), "entropy"),
      row("lookahead", fixed(signals.ahead[i]), "ahead"),
      row("log p student", fixed(signals.student[i]), "student"),
      row("log p teacher", fixed(signals.teacher[i]), "teacher"),
      row("δ, T − S", signed(more.delta)),
      row("magnitude", fixed(more.magnitude)),
      row("gate", [fixed(signals.gate[i]), meter(signals.gate[i])]),
      row("restored", signed(more.restored)),
      row("token weight", el("b", {}, signed(signals.weight[i]))),
    ),
    el("p", { class: "fine" }, "weight = advantage × magnitude × gate. The gate divides by the round's largest entropy; training takes its minibatch's."),
  );
}

function tokenKeys(event) {
  const first = reader.page * PAGE;
  const { regime } = signalsOf(reader.trace);
  const now = reader.token ?? first;
  const seek = (code) => {
    for (let i = now + 1; i < regime.length; i += 1) if (regime[i] === code && regime[i - 1] !== code) return i;
    return now;
  };
  const to = {
    ArrowRight: () => now + 1,
    ArrowLeft: () => now - 1,
    ArrowDown: () => sameColumn(now, 1),
    ArrowUp: () => sameColumn(now, -1),
    Home: () => first,
    End: () => Math.min(first + PAGE, regime.length) - 1,
    PageDown: () => first + PAGE,
    PageUp: () => first - PAGE,
    p: () => seek(2),
    f: () => seek(3),
    Enter: () => now,
  }[event.key];
  if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const next = to();
  if (event.key === "Enter") openHash(reader.trace, now);
  else if (next >= 0 && next < regime.length) {
    if (Math.floor(next / PAGE) !== reader.page) {
      drawReader(reader.trace, Math.floor(next / PAGE));
      document.getElementById("tokens").focus();
    }
    select(next, { pin: true, scroll: true });
  }
}

// The token nearest below or above on the screen.
function sameColumn(now, direction) {
  const first = reader.page * PAGE;
  const box = reader.spans[now - first].getBoundingClientRect();
  let [best, distance] = [now, Infinity];
  for (let k = now - first + direction; k >= 0 && k < reader.spans.length; k += direction) {
    const other = reader.spans[k].getBoundingClientRect();
    const lines = Math.abs(other.top - box.top) / Math.max(box.height, 1);
    if (lines < 0.5) continue;
    if (lines > 2.6) break;
    const gap = Math.abs(other.left - box.left) + 1000 * Math.round(lines);
    if (gap < distance) [best, distance] = [first + k, gap];
  }
  return best;
}
