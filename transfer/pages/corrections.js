"use strict";
// The choices of cards. A card has data-paths, its buttons data-labels: URI-encoded words, one per photo of the card, "="
// where nothing changes; they are decoded only where the chosen ones are saved, as a list of `path label` lines.
{
  const dock = document.querySelector(".dock"), saver = dock.querySelector("button");
  const cards = [...document.querySelectorAll("[data-paths]")];
  const places = new Map(cards.map((card, place) => [card, place]));
  const paths = cards.map((card) => card.dataset.paths.split(" "));
  const cardsOf = new Map();
  paths.forEach((some, place) => some.forEach((path) => cardsOf.set(path, [...(cardsOf.get(path) ?? []), place])));
  const decisions = new Map(), steps = [];  // labels by card, the latest last; what each step replaced
  const key = `corrections ${dock.dataset.page}`;
  let saved = true;

  const controls = (card) => [...card.querySelectorAll(".choices button, .choices select")];
  const options = [...document.querySelector("#classes").content.children];
  const fill = (select) => select.length > 1 || select.append(...options.map((option) => option.cloneNode(true)));
  const listed = (place, value) => paths[place].map(() => value).join(" ");

  function isChoice(place, labels) {
    const values = [...cards[place].querySelectorAll("button")].map((button) => button.dataset.labels);
    return values.includes(labels) || options.some((option) => listed(place, option.value) === labels);
  }

  function show(place) {
    const card = cards[place], labels = decisions.get(place), select = card.querySelector("select");
    let pressed = labels === undefined;
    for (const button of card.querySelectorAll("button")) {
      const chosen = button.dataset.labels === labels;
      pressed ||= chosen;
      button.setAttribute("aria-pressed", chosen);
    }
    if (!pressed) fill(select);
    select.value = pressed ? "" : labels.split(" ")[0];
    select.classList.toggle("chosen", !pressed);
    card.classList.toggle("decided", labels !== undefined);
  }

  function count() {
    const open = cards.length - decisions.size;
    dock.querySelector("[role=status]").textContent =
      `${decisions.size.toLocaleString("en")} decided, ${open.toLocaleString("en")} to go`;
    saver.disabled = !decisions.size;
  }

  function keep() {
    count();
    try {
      localStorage.setItem(key, JSON.stringify({ decisions: [...decisions], saved }));
    } catch {  // closed to files, or full
      dock.querySelector(".volatile").hidden = false;
    }
  }

  function restore() {
    const shown = [...decisions.keys()];
    try {
      const kept = JSON.parse(localStorage.getItem(key) ?? "{}");
      decisions.clear();
      for (const [place, labels] of kept.decisions ?? []) if (isChoice(place, labels)) decisions.set(place, labels);
      saved = kept.saved ?? true;
    } catch {  // closed to files: `keep` says so
    }
    for (const place of new Set([...shown, ...decisions.keys()])) show(place);
    count();
  }

  // Puts these decisions in place of those of the same cards; undefined is none.
  function replace(changes) {
    const before = changes.map(([place]) => [place, decisions.get(place)]);
    for (const [place, labels] of changes) {
      decisions.delete(place);
      if (labels !== undefined) decisions.set(place, labels);
      show(place);
    }
    saved = false;
    keep();
    return before;
  }

  // A photo has one label: what another card says otherwise of the same photo is taken back.
  function decide(place, labels) {
    const changes = [[place, labels === decisions.get(place) ? undefined : labels]];
    labels.split(" ").forEach((label, photo) => {
      const path = paths[place][photo];
      for (const other of label === "=" ? [] : cardsOf.get(path)) {
        const theirs = other === place ? "=" : decisions.get(other)?.split(" ")[paths[other].indexOf(path)] ?? "=";
        if (theirs !== "=" && theirs !== label) changes.push([other, undefined]);
      }
    });
    steps.push(replace(changes));
  }

  function visit(place, which = 0) {
    const folded = cards[place].closest("details");
    if (folded) folded.open = true;
    const some = controls(cards[place]);
    some[Math.min(which, some.length - 1)].focus();
  }

  function visitNext(place) {
    const next = cards.findIndex((_, other) => other > place && !decisions.has(other));
    if (next >= 0) visit(next);
    else saver.focus();
  }

  function lines() {
    const labels = new Map();
    for (const [place, chosen] of decisions) {
      chosen.split(" ").forEach((label, photo) => label === "=" || labels.set(paths[place][photo], label));
    }
    return [...labels].map((line) => `${line.map(decodeURIComponent).join(" ")}\n`);
  }

  function save() {
    const head = "# Each line is a path and its class, or - to leave the photo out.\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([head, ...lines()], { type: "text/plain" }));
    link.download = dock.dataset.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    saved = true;
    keep();
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button"), card = event.target.closest("[data-paths]");
    if (button === saver) save();
    else if (button && card) {
      decide(places.get(card), button.dataset.labels);
      if (event.detail === 0) visitNext(places.get(card));  // by keyboard
    }
  });
  document.addEventListener("change", (event) => {
    const place = places.get(event.target.closest("[data-paths]"));
    if (event.target.value) decide(place, listed(place, event.target.value));
    else if (decisions.has(place)) steps.push(replace([[place, undefined]]));
  });
  for (const kind of ["pointerdown", "focusin"]) {
    document.addEventListener(kind, (event) => event.target.matches?.("[data-paths] select") && fill(event.target));
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const control = event.target.closest("button, select"), card = event.target.closest("[data-paths]");
    if (event.key === "u" && control?.tagName !== "SELECT" && steps.length) {
      const step = steps.pop();
      replace(step);
      visit(step[0][0]);
    } else if (card && control) {
      const some = controls(card), place = places.get(card), here = some.indexOf(control);
      const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key], upwards = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      const chosen = some[Number(event.key) - 1];
      if (sideways) some[Math.min(Math.max(here + sideways, 0), some.length - 1)].focus();
      else if (control.tagName === "SELECT") return;
      else if (upwards && cards[place + upwards]) visit(place + upwards, here);
      else if (chosen?.tagName === "SELECT") chosen.focus();
      else if (chosen) {
        decide(place, chosen.dataset.labels);
        visitNext(place);
      } else return;
    } else return;
    event.preventDefault();
  });
  window.addEventListener("beforeunload", (event) => {
    if (!saved && decisions.size) event.preventDefault();
  });

  // Another tab of this page decides for this one too.
  window.addEventListener("storage", (event) => event.key === key && restore());

  for (const choices of document.querySelectorAll(".choices")) choices.hidden = false;
  restore();
  keep();
  dock.hidden = !cards.length;
}
