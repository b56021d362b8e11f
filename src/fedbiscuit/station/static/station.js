// Keys, the time a judgement takes, and what screen readers are told. Texts of people and models only ever pass as text.
"use strict";
(() => {
  const stage = () => document.getElementById("stage");
  const live = document.getElementById("live");
  const trouble = document.getElementById("trouble");
  const help = document.getElementById("help");
  let busy = false;

  // How long the pair has been in sight, in seconds; an unseen window does not count.
  let seen = 0, since = document.hidden ? null : performance.now(), timed = null;
  const elapsed = () => (seen + (since === null ? 0 : performance.now() - since)) / 1000;
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { seen = elapsed() * 1000; since = null; } else if (since === null) since = performance.now();
  });
  const startTiming = () => {
    const token = stage()?.dataset.token ?? null;
    if (token === timed) return;
    timed = token; seen = 0; since = document.hidden ? null : performance.now();
  };

  const typing = (target) => target.closest("input, textarea, select, [contenteditable]") !== null;
  const keysAreOn = () => localStorage.getItem("keys") !== "off";
  const press = (key) => document.querySelector(`#stage [data-key~="${key}"]`)?.click();
  const answers = () => [...document.querySelectorAll("#stage .answer .text")];

  const walk = (step) => {
    const [first, second] = answers();
    if (!first) return false;
    (step < 0 ? first : second).focus();
    return true;
  };
  const scroll = (step) => {
    if (!answers().length || document.activeElement.closest(".prompt")) return false; // a prompt scrolls by itself
    const box = answers().includes(document.activeElement) ? document.activeElement : answers()[0];
    if (box !== document.activeElement) box.focus();
    box.scrollBy({ top: step * 60, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    return true;
  };
  const ARROWS = {
    ArrowLeft: () => walk(-1), ArrowRight: () => walk(1), ArrowUp: () => scroll(-1), ArrowDown: () => scroll(1),
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      const why = document.querySelector(".why[open]");
      if (why) { why.open = false; why.querySelector("summary").focus(); }
      return;
    }
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (typing(event.target) || help?.open || !keysAreOn()) return;
    if (event.key in ARROWS) {
      if (ARROWS[event.key]()) event.preventDefault();
      return;
    }
    if (event.repeat) return; // a key that is held down judges once
    if (event.key === "?" && help) {
      event.preventDefault();
      help.showModal();
    } else if (event.key.toLowerCase() === "r" && document.querySelector(".why")) {
      event.preventDefault();
      document.querySelector(".why").open = true;
      document.getElementById("reason").focus();
    } else if (/^[12a-z]$/i.test(event.key)) {
      if (!busy) press(event.key.toLowerCase());
    }
  });

  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-help]") && help) { event.preventDefault(); help.showModal(); }
    if (event.target.closest('[aria-disabled="true"]')) event.preventDefault();
  });
  document.addEventListener("submit", (event) => {
    const seconds = event.target.querySelector('[name="seconds"]');
    if (seconds) seconds.value = elapsed().toFixed(1);
  }, true);

  const keys = document.getElementById("keys-on");
  if (keys) {
    keys.closest("label").hidden = false;
    keys.checked = keysAreOn();
    keys.addEventListener("change", () => localStorage.setItem("keys", keys.checked ? "on" : "off"));
  }

  document.body.addEventListener("htmx:beforeRequest", (event) => { if (event.detail.requestConfig.verb === "post") busy = true; });
  document.body.addEventListener("htmx:afterRequest", () => { busy = false; });
  // What had the focus may be gone with the pair: then the focus is at the content, not back at the top of the page.
  // A list that was scrolled stays where it was; what has the focus there gets it back from htmx, by its id.
  let inside = false, scrolled = 0;
  const list = () => document.getElementById("prompts-asked");
  document.body.addEventListener("htmx:beforeSwap", () => {
    inside = stage()?.contains(document.activeElement) ?? false;
    scrolled = list()?.scrollTop ?? 0;
  });
  document.body.addEventListener("htmx:afterSwap", () => { if (list()) list().scrollTop = scrolled; });
  document.body.addEventListener("htmx:afterSettle", () => {
    trouble.hidden = true;
    if (inside && document.activeElement === document.body) stage()?.focus({ preventScroll: true });
    inside = false;
    startTiming();
    const text = stage()?.dataset.say ?? "";
    if (text && live.textContent !== text) live.textContent = text;
  });
  const sayTrouble = (text) => {
    trouble.querySelector("span").textContent = text;
    trouble.hidden = false;
  };
  for (const silence of ["htmx:sendError", "htmx:timeout"]) {
    document.body.addEventListener(silence, () => {
      sayTrouble("The station does not answer. Is it still running in its terminal? What you did last may not be kept.");
    });
  }
  document.body.addEventListener("htmx:responseError", (event) => {
    const { status, responseText } = event.detail.xhr;
    const why = new DOMParser().parseFromString(responseText, "text/html").querySelector("main p")?.textContent;
    sayTrouble(status === 403
      ? "This page belongs to an earlier start of the station. Open the address that its terminal shows now."
      : why || "The station could not do this. Load the page again.");
  });
  startTiming();
})();
