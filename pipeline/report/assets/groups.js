// Groups: all traces of a problem side by side, with verdicts, rewards, advantages, where they part ways, and each token's weight.

const GROUP_TOKENS = 400; // tokens of a trace that are shown beside its siblings
const OUTCOMES = {
  mixed: ["right and wrong", (g) => g.correct > 0 && g.wrong > 0],
  right: ["all right", (g) => g.wrong === 0],
  wrong: ["none right", (g) => g.correct === 0],
};
const GROUPED = {
  spread: ["Largest spread of rewards", (a, b) => b.spread - a.spread || a.index - b.index],
  hardest: ["Fewest right", (a, b) => a.correct / a.of - b.correct / b.of || a.index - b.index],
  late: ["Part ways last", (a, b) => b.common - a.common || a.index - b.index],
  round: ["Round", (a, b) => a.index - b.index],
};

function groupsView(root) {
  if (!DATA.groups.length) return void root.append(nothingHere());
  const list = pickList({
    label: "Groups",
    render: groupItem,
    open: (group) => {
      go({ group: String(group.index) }, { push: true });
      reveal(document.getElementById("group"));
    },
    isOpen: (group) => String(group.index) === at.group,
  });
  const side = el(
    "aside",
    { class: "side card counts", "aria-label": "Pick a group" },
    el(
      "div",
      { class: "fields" },
      bound("Outcome", "outcome", [["", "any"], ...named(OUTCOMES)]),
      bound("Round", "round", roundChoices(DATA.groups)),
      bound("Order", "grouped", named(GROUPED), DEFAULTS.grouped, true),
      searchField(),
    ),
    list.found,
    list.items,
    el("p", { class: "fine" }, sampleNote()),
  );
  root.append(el("div", { class: "workbench" }, side, el("div", { id: "group", class: "stack" })));
  root.list = list;
}

function updateGroups(root) {
  if (!DATA.groups.length) return;
  const rows = DATA.groups
    .filter((g) => !at.outcome || OUTCOMES[at.outcome]?.[1](g))
    .filter((g) => !at.round || String(g.round) === at.round)
    .filter((g) => !at.q || g.members.some(matches(at.q)))
    .sort((GROUPED[at.grouped] ?? GROUPED.spread)[1]);
  const group = DATA.groups[Number(at.group || NaN)] ?? rows[0];
  at.group = group ? String(group.index) : "";
  root.list.fill(rows, "group", searching());
  if (group) return drawGroup(group);
}

const groupItem = (group) => [
  el("span", { class: "verdict", "aria-hidden": "true" }, `${group.correct}/${group.of}`),
  el("span", { class: "what" }, foreign(group.problem.slice(0, 120))),
  el(
    "span",
    { class: "facts" },
    el("span", { class: "unseen" }, `${group.correct} of ${group.of} right. `),
    `round ${group.round} · reward ${fixed(group.reward, 2)} ± ${fixed(group.spread, 2)} · ${isPart(group) ? `${group.members.length}\u00a0shown` : `${count(group.common)}\u00a0tokens\u00a0alike`}`,
  ),
];

const isPart = (group) => group.members.length < group.of;

async function drawGroup(group) {
  const all = await Promise.all(group.members.map(signalsOf));
  const root = document.getElementById("group");
  const key = `${group.run.number} ${group.index} ${at.colour}`;
  if (at.view !== "groups" || at.group !== String(group.index) || root.dataset.key === key) return;
  root.dataset.key = key;
  const [first] = all;
  const rewards = Object.keys(first.rewards);
  const heaviest = Math.max(...all.map((signals) => largest(signals.weight)));
  const said = el("output", {});
  const readout = el("div", { class: "told card away" }, said, closing(() => readout));
  const show = (parts) => {
    readout.classList.remove("away");
    said.replaceChildren(...parts);
  };
  const note = DATA.sample.rounds[group.round].note;
  const rows = group.members.map((trace, i) => [
    traceLink(trace),
    el("span", { class: verdictOf(trace.verdict).tone }, `${verdictOf(trace.verdict).glyph} ${trace.verdict}`),
    foreign(all[i].extracted || "–"),
    fixed(trace.reward, 3),
    ...rewards.map((name) => fixed(all[i].rewards[name], 3)),
    signed(trace.advantage, 3),
    count(trace.length),
    trace.apart >= trace.length ? "never" : `token ${trace.apart}`,
  ]);
  redraw(
    root,
    el(
      "article",
      { class: "card trace" },
      el(
        "header",
        {},
        el("p", { class: "eyebrow" }, `Round ${group.round} · ${isPart(group) ? `${group.members.length} of ${group.of} traces are in this page` : `${group.of} traces`}`),
        el("h2", {}, foreign(first.problem)),
        el(
          "p",
          { class: "chips" },
          chip(["reference ", foreign(first.answer)]),
          chip(`${group.correct} of ${group.of} right`),
          chip(`mean reward ${fixed(group.reward, 3)}, standard deviation ${fixed(group.spread, 3)}`),
          isPart(group) ? null : chip(whyAlike(group)),
        ),
        note ? el("p", { class: "fine" }, foreign(note)) : null,
      ),
      table("Verdicts, rewards and advantages", ["trace", "verdict", "read", "reward", ...rewards, "advantage", "tokens", "parts ways at"], rows, {
        words: [1, 2],
        hideCaption: true,
        tone: "off-phone",
      }),
      group.spread === 0 ? el("p", { class: "fine" }, `All rewards are equal. With a group baseline no trace has an advantage: ${SILENT[DATA.run.advantage]}.`) : null,
      colourField(),
      el("ul", { class: "legend" }, el("li", {}, ramp(), el("span", { class: "soft" }, colourOf().text)), el("li", {}, el("span", { class: "alike" }, "alike"), el("span", { class: "soft" }, "a sibling begins with these tokens too")), el("li", {}, el("span", { class: "fork-mark" }, "▸"), el("span", { class: "soft" }, "here the trace leaves its last sibling"))),
      el("p", { class: "fine off-paper" }, isTouched() ? "Tap a token to read its weight, and again to open its trace." : "Point at a token to read its weight. A click opens its trace."),
      group.members.map((trace, i) => besides(trace, all[i], heaviest, show)),
      promptBelow("Prompt as the student saw it", first.prompt),
      promptBelow("Prompt as the teacher saw it", first.context ?? first.teacher_prompt),
      el("details", { class: "below" }, el("summary", {}, "Reference solution"), el("pre", {}, whole(first.solution, DATA.sample.most_text))),
    ),
    readout,
  );
}

const whyAlike = (group) =>
  group.common === 0 ? "they differ from the first token on" : `the first ${count(group.common)} tokens are alike in all`;

const traceLink = (trace) =>
  el("button", { type: "button", class: "link", onclick: () => openHash(trace, null) }, `sample ${trace.sample}`);

// One trace beside its siblings.
function besides(trace, signals, heaviest, show) {
  const normaliser = DATA.sample.rounds[trace.round].normaliser;
  const tint = tintOf(signals, normaliser, { advantage: trace.advantage, heaviest });
  const shown = Math.min(GROUP_TOKENS, signals.tokens.length);
  const tell = (target) => {
    const i = Number(target?.dataset.i ?? NaN);
    if (!Number.isNaN(i)) show(weightOf(trace, signals, i));
  };
  let tapped = null;
  const line = el("div", {
    class: "beside",
    onpointerover: (event) => tell(event.target.closest(".tok")),
    onclick: (event) => {
      const token = event.target.closest(".tok");
      if (!token) return;
      const first = event.pointerType === "touch" && tapped !== token;
      tapped = token;
      if (first) tell(token);
      else openHash(trace, Number(token.dataset.i));
    },
  });
  for (let i = 0; i < shown; i += 1) {
    const { shown: text, kind, breaks } = tokenText(signals.tokens[i]);
    if (i === trace.apart && trace.group.members.length > 1)
      line.append(el("span", { class: "fork-mark", title: "parts ways here", role: "img", "aria-label": "parts ways here" }, "▸"));
    line.append(el("span", { class: `tok ${tint(i)} ${kind}${i < trace.apart ? " alike" : ""}`, "data-i": i }, text));
    if (breaks) line.append(el("br"));
  }
  const rest = signals.tokens.length - shown;
  const verdict = verdictOf(trace.verdict);
  return el(
    "section",
    { class: "sibling", "aria-label": `Sample ${trace.sample}` },
    el(
      "p",
      { class: "sibling-head" },
      el("span", { class: `verdict ${verdict.tone}` }, `${verdict.glyph} ${trace.verdict}`),
      traceLink(trace),
      el("span", {}, `advantage ${signed(trace.advantage, 2)}`),
      el("span", {}, `reward ${fixed(trace.reward, 2)}`),
      el("span", { class: "on-phone" }, signals.extracted ? ["read ", foreign(signals.extracted)] : "nothing read"),
      el("span", { class: "on-phone" }, `${count(trace.length)} tokens`),
    ),
    line,
    rest > 0 ? el("p", { class: "fine" }, `${count(rest)} further tokens: open the trace.`) : null,
  );
}

const weightOf = (trace, signals, i) => [
  el("b", {}, foreign(tokenText(signals.tokens[i]).shown.replace(/ /g, "␣"))),
  ` sample ${trace.sample}, token ${i}: weight `,
  el("b", {}, signed(signals.weight[i])),
  ` = advantage ${signed(trace.advantage)} × magnitude ${fixed(signals.magnitude[i])} × gate ${fixed(signals.gate[i])}`,
  ` · log p student ${fixed(signals.student[i])}, teacher ${fixed(signals.teacher[i])}`,
  ` · teacher entropy ${fixed(signals.entropy[i])} · ${REGIMES[signals.regime[i]].name}`,
];
