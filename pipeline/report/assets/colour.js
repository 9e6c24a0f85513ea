// How a token is tinted: by one of its stored signals. A negative value is striped, so that it is told without colour.

const COLOURS = {
  entropy: { name: "Teacher entropy", text: "tint: teacher entropy, from 0 to the largest of the round" },
  ahead: { name: "Lookahead entropy", text: "tint: lowest entropy of the token and the next ones, from 0 to the largest of the round" },
  gate: { name: "Gate", text: "tint: gate, from 0 to 1" },
  weight: { name: "Weight of each token", text: "tint: weight of the token's label, which is advantage × magnitude × gate; striped: negative", signed: true },
  advantage: { name: "Advantage", text: "tint: advantage of the trace, the same for all its tokens; striped: negative", signed: true },
  delta: { name: "Log-ratio teacher − student", text: "tint: log p teacher − log p student, up to 2 nats; striped: negative", signed: true },
  regime: { name: "Regime", text: "tint: lock none, mid light, pivot strong, fork striped" },
  alignment: { name: "Alignment with accuracy", text: "tint: how far a likelier token raises accuracy, up to the most of this trace; striped: it lowers it; no tint in a round without an audit", signed: true },
  none: { name: "None", text: "no tint" },
};
// Without a choice a trace shows where the teacher is unsure, and a group what each token weighs.
const colourKey = () => (at.colour in COLOURS ? at.colour : at.view === "groups" ? "weight" : "entropy");
const colourOf = () => COLOURS[colourKey()];
const LARGEST_DELTA = 2;
const level = (share) => Math.round(10 * Math.sqrt(Math.min(1, Math.abs(share) || 0)));

// A function from the place of a token to its class. heaviest: the |weight| that gets the full tint.
function tintOf(signals, normaliser, { advantage = 0, heaviest = largest(signals.weight) } = {}) {
  const most = signals.alignment ? largest(signals.alignment) : 1;
  const steps = (value) => `${value < 0 ? "n" : "h"}${Math.round(10 * Math.min(1, Math.abs(value)))}`;
  return {
    entropy: (i) => `h${level(signals.entropy[i] / normaliser)}`,
    ahead: (i) => `h${level(signals.ahead[i] / normaliser)}`,
    gate: (i) => `h${Math.round(10 * Math.min(1, signals.gate[i]))}`,
    weight: (i) => steps(signals.weight[i] / heaviest),
    advantage: () => steps(advantage / LARGEST_DELTA),
    delta: (i) => steps(signals.delta[i] / LARGEST_DELTA),
    regime: (i) => ["h0", "h2", "h7", "n7"][signals.regime[i]],
    alignment: (i) => (signals.alignment ? steps(signals.alignment[i] / most) : "h0"),
    none: () => "h0",
  }[colourKey()];
}

function largest(values) {
  let found = 1e-6;
  for (const value of values) found = Math.max(found, Math.abs(value));
  return found;
}

const coloursHere = () => Object.keys(COLOURS).filter((key) => key !== "alignment" || audited());
const colourField = () =>
  el(
    "div",
    { class: "colours" },
    bound("Colour by", "colour", coloursHere().map((key) => [key, COLOURS[key].name]), colourKey()),
  );

const ramp = () =>
  el(
    "span",
    { class: "ramp", "aria-hidden": "true" },
    colourOf().signed ? [10, 7, 4, 2].map((h) => el("i", { class: `n${h}` })) : null,
    [0, 2, 4, 7, 10].map((h) => el("i", { class: `h${h}` })),
  );
