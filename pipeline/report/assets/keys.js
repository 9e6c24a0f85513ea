// Keys for the whole page: j and k move in the list, / goes to the search, ? tells them all.

const KEYS = [
  ["j, k", "next and previous trace, group or problem"],
  ["/", "search"],
  ["1 to 6", "the views, from left to right"],
  ["← →", "next and previous token, or point of a chart"],
  ["p, f", "next pivot, next fork (in a trace)"],
  ["Enter", "link to the token; open the traces of a chart's round"],
  ["?", "this help; Esc closes it"],
];

function stepBy(step) {
  const list = document.getElementById(`view-${at.view}`)?.list;
  if (list) list.step(step);
}

function help() {
  const dialog = el(
    "dialog",
    { class: "card", "aria-label": "Keys", onclose: () => dialog.remove() },
    el("h2", {}, "Keys"),
    table("Keys", ["key", "what it does"], KEYS, { hideCaption: true, words: [1] }),
    el("p", {}, el("button", { type: "button", class: "more", onclick: () => dialog.close() }, "Close")),
  );
  document.body.append(dialog);
  dialog.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog")) return;
  if (event.target.closest("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const views = Object.keys(shownViews());
  const act = {
    j: () => stepBy(1),
    k: () => stepBy(-1),
    "/": () => document.querySelector(`#view-${at.view} input[type=search]`)?.focus(),
    "?": help,
  }[event.key];
  if (act) act();
  else if (/^[1-9]$/.test(event.key) && views[event.key - 1]) go({ view: views[event.key - 1] }, { push: true });
  else return;
  event.preventDefault();
});
