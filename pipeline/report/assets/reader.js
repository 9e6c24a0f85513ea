// One trace: its text, the curves aligned under its tokens, and the signals of the selected token.

const PAGE = 600; // tokens on screen at one time; a trace of 100 000 has pages
const reader = { trace: null, signals: null, colour: "", page: 0, token: null, pinned: null, spans: [], cursor: null, strip: null, column: 20 };

async function openTrace(trace, token) {
  const signals = await signalsOf(trace);
  if (at.view !== "traces" || at.trace !== trace.id) return; // another one was opened meanwhile
  const fresh = reader.trace !== trace || reader.colour !== at.colour;
  const place = token === null ? null : Math.min(Math.max(token, 0), signals.tokens.length - 1);
  const page = Math.floor((place ?? 0) / PAGE);
  Object.assign(reader, { signals, colour: at.colour });
  if (fresh || page !== reader.page || !reader.spans.length) drawReader(trace, page);
  document.getElementById("inspector").classList.toggle("away", place === null); // as a sheet it would cover what is not read yet
  if (place !== null) select(place, { pin: true, scroll: true });
  else select(firstOfInterest(signals, page), { pin: false, scroll: false });
}

// The token that is selected first: the pivot with the highest entropy on the page, else the token with the highest entropy.
function firstOfInterest({ regime, entropy }, page) {
  let best = page * PAGE;
  const worth = (i) => entropy[i] + (regime[i] === 2 ? 100 : 0);
  for (let i = best; i < Math.min(entropy.length, (page + 1) * PAGE); i += 1) if (worth(i) > worth(best)) best = i;
  return best;
}

function drawReader(trace, page) {
  const root = document.getElementById("reader");
  const { signals } = reader;
  const normaliser = DATA.sample.rounds[trace.round].normaliser;
  const note = [signals.taught, DATA.sample.rounds[trace.round].note].filter(Boolean).join(" ");
  const first = page * PAGE;
  const last = Math.min(first + PAGE, signals.tokens.length);
  Object.assign(reader, { trace, page, token: null, pinned: null, spans: [] });
  const verdict = verdictOf(trace.verdict);
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
  text.append(...tokenRuns(signals, first, last, tintOf(signals, normaliser, { advantage: trace.advantage })));
  const detail = el("aside", { class: "inspector card", id: "inspector", "aria-label": "Token" });
  const turn = root.contains(document.activeElement) ? document.activeElement.dataset.turn : null;
  redraw(
    root,
    el(
      "article",
      { class: "card trace" },
      el(
        "header",
        {},
        el(
          "p",
          { class: "eyebrow" },
          trace.source === "import"
            ? `Round ${trace.round} · sample ${trace.sample} · imported with the source`
            : `Round ${trace.round} · policy ${trace.policy} · sample ${trace.sample} · written by the ${trace.source}`,
        ),
        el("h2", {}, foreign(signals.problem)),
        el(
          "p",
          { class: "chips" },
          chip(`${verdict.glyph} ${trace.verdict}`, verdict.tone),
          signals.extracted ? chip(["read ", foreign(signals.extracted)]) : null,
          chip(["reference ", foreign(signals.answer)]),
          chip(`reward ${fixed(trace.reward, 2)}`),
          Object.entries(signals.rewards).map(([name, value]) => chip([foreign(name), ` ${fixed(value, 2)}`])),
          chip(`advantage ${signed(trace.advantage, 2)}`),
          chip(`${count(trace.length)} tokens, ended by ${trace.finish}`),
          chip(`${many(trace.pivots, "pivot")}, ${many(trace.forks, "fork")}`),
        ),
        note ? el("p", { class: "fine" }, foreign(note)) : null,
      ),
      signals.tokens.length > PAGE ? overview(trace, signals, page, normaliser) : null,
      colourField(),
      text,
      legend(),
      stripOf(trace, signals, first, last, normaliser),
      below(signals, first, last),
      el(
        "p",
        { class: "turn" },
        el("button", { type: "button", "data-turn": "previous", onclick: () => stepBy(-1) }, "← Previous trace"),
        el(
          "button",
          { type: "button", onclick: () => go({ view: "groups", group: String(trace.group.index) }, { push: true }) },
          "Its group side by side",
        ),
        el("button", { type: "button", "data-turn": "next", onclick: () => stepBy(1) }, "Next trace →"),
      ),
    ),
    detail,
  );
  // The pressed button is replaced, so the focus moves to its successor for users of the keyboard.
  if (turn) (root.querySelector(`[data-turn="${turn}"]:enabled`) ?? text).focus({ preventScroll: true });
}

// The tokens in runs of one regime. A run has one underline, and its first token shows the letter of the regime.
function tokenRuns(signals, first, last, tint) {
  const found = [];
  let start = first;
  while (start < last) {
    const code = signals.regime[start];
    let end = start + 1;
    while (end < last && signals.regime[end] === code) end += 1;
    const run = el("span", { class: `run ${REGIMES[code].name}` });
    for (let i = start; i < end; i += 1) {
      const { shown, kind, breaks } = tokenText(signals.tokens[i]);
      const token = el(
        "span",
        {
          class: `tok ${tint(i)} ${kind}`,
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
  const name = (r) =>
    el(
      "li",
      {},
      el("span", { class: `run ${r.name}` }, el("span", { class: "tok", "data-letter": r.letter }, r.name)),
      el("span", { class: "soft" }, r.text),
    );
  return el("ul", { class: "legend marks" }, REGIMES.map(name), el("li", {}, ramp(), el("span", { class: "soft" }, colourOf().text)));
}

function below(signals, first, last) {
  const rows = el(
    "details",
    {
      class: "below",
      ontoggle: (event) =>
        event.target.open && event.target.children.length === 1 && event.target.append(tokenTable(signals, first, last)),
    },
    el("summary", {}, "Tokens as a table"),
  );
  return [
    promptBelow("Prompt as the student saw it", signals.prompt),
    promptBelow("Prompt as the teacher saw it", signals.context ?? signals.teacher_prompt),
    el("details", { class: "below" }, el("summary", {}, "Plain response"), el("pre", {}, whole(signals.text, DATA.sample.most_text))),
    el("details", { class: "below" }, el("summary", {}, "Reference solution"), el("pre", {}, whole(signals.solution, DATA.sample.most_text))),
    rows,
    el("details", { class: "below" }, el("summary", {}, "What the figures of a token are"), el("dl", { class: "words" }, words())),
  ];
}

// The ids of a prompt, as the model read them: each id is one piece, and special ids are set apart.
function promptBelow(title, prompt) {
  if (!prompt) return null;
  const piece = (word) => {
    const { shown, kind, breaks } = tokenText(word);
    return [el("span", { class: `piece ${kind}` }, shown), breaks ? el("br") : null];
  };
  const rest = prompt.size - prompt.words.length;
  const fill = (event) => {
    if (!event.target.open || event.target.children.length > 1) return;
    event.target.append(
      el("div", { class: "pieces", role: "region", tabindex: "0", "aria-label": title }, [...prompt.words].map(piece)),
      rest > 0 ? el("p", { class: "fine" }, `${count(rest)} further tokens are not in this page.`) : "",
    );
  };
  return el("details", { class: "below", ontoggle: fill }, el("summary", {}, `${title} (${count(prompt.size)} tokens)`));
}

function tokenTable(signals, first, last) {
  const rows = [];
  for (let i = first; i < last; i += 1) {
    rows.push([
      String(i),
      foreign(tokenText(signals.tokens[i]).shown),
      REGIMES[signals.regime[i]].name,
      fixed(signals.entropy[i]),
      fixed(signals.ahead[i]),
      fixed(signals.student[i]),
      fixed(signals.teacher[i]),
      fixed(signals.magnitude[i], 2),
      fixed(signals.gate[i]),
      signed(signals.restored[i]),
      signed(signals.weight[i]),
    ]);
  }
  return table(
    "Tokens",
    [
      "#",
      "token",
      "regime",
      "entropy",
      "lookahead",
      "log p student",
      "log p teacher",
      "magnitude",
      "gate",
      "restored",
      "weight",
    ],
    rows,
    { hideCaption: true, words: [1, 2] },
  );
}

// ---- the selected token ------------------------------------------------------------------------------------------------

function hover(token) {
  if (!token) return;
  document.getElementById("inspector").classList.remove("away");
  select(Number(token.dataset.i), {});
}

// Select token i. pin: it stays selected when the pointer leaves. scroll: bring it into view. still: do not move the strip.
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
  inspect(reader.signals, i);
}

function inspect(signals, i) {
  const regime = REGIMES[signals.regime[i]];
  const { shown, kind } = tokenText(signals.tokens[i]);
  const row = (name, value, tone) => [el("dt", { class: tone || null, title: FIGURES[name]() }, name), el("dd", {}, value)];
  const meter = (value) =>
    svg(
      "svg",
      { class: "meter", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { class: "track", width: 100, height: 4 }),
      svg("rect", { class: "fill", width: 100 * Math.min(1, Math.max(0, value)), height: 4 }),
    );
  document
    .getElementById("inspector")
    .replaceChildren(
      el(
        "div",
        { class: "head" },
        el(
          "p",
          { class: "eyebrow" },
          `Token ${i} of ${signals.tokens.length}${kind === "plain" ? "" : kind === "special" ? ", special" : ", bytes without a text"}`,
        ),
        closing(() => document.getElementById("inspector")),
        el("p", { class: "big" }, foreign(shown.replace(/ /g, "␣"))),
        el(
          "p",
          { class: "regime" },
          el("span", { class: `badge ${regime.name}` }, regime.letter),
          el("span", {}, el("b", {}, regime.name), el("span", { class: "why" }, ` ${regime.text}`)),
        ),
      ),
      el(
        "dl",
        {},
        row("entropy, nats", fixed(signals.entropy[i]), "entropy"),
        row("lookahead", fixed(signals.ahead[i]), "ahead"),
        row("log p student", fixed(signals.student[i]), "student"),
        row("log p teacher", fixed(signals.teacher[i]), "teacher"),
        row("log-ratio δ", signed(signals.delta[i])),
        row("magnitude", fixed(signals.magnitude[i])),
        row("gate", [fixed(signals.gate[i]), meter(signals.gate[i])]),
        row("restored", signed(signals.restored[i])),
        row("token weight", el("b", {}, signed(signals.weight[i]))),
        signals.alignment ? row("alignment", signed(signals.alignment[i])) : "",
      ),
      ...(alternatives(signals, i) ?? []),
      el(
        "p",
        { class: "fine" },
        "The label's weight = advantage × magnitude × gate. Its gate divides by the largest entropy of the round, one of training by that of the minibatch.",
      ),
    );
}

// The tokens that the teacher finds likeliest at the position of token i, with their probabilities. Nothing where none were kept.
function alternatives({ alternatives: kept, tokens }, i) {
  if (!kept) return null;
  const rows = Array.from({ length: kept.count }, (_, k) => i * kept.count + k).map((place) =>
    el(
      "li",
      { class: kept.tokens[place] === tokens[i] ? "own" : null },
      foreign(tokenText(kept.tokens[place]).shown.replace(/ /g, "␣")),
      el("span", {}, fixed(kept.probs[place])),
    ),
  );
  return [el("p", { class: "fine" }, "The teacher's likeliest tokens here"), el("ol", { class: "alternatives" }, rows)];
}

function tokenKeys(event) {
  const first = reader.page * PAGE;
  const { regime } = reader.signals;
  const now = reader.token ?? first;
  const seek = (code) => {
    for (let i = now + 1; i < regime.length; i += 1) if (regime[i] === code && regime[i - 1] !== code) return i;
    return now;
  };
  document.getElementById("inspector").classList.remove("away");
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

// The nearest token in the line below or above on the screen.
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
