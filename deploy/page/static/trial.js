// Trials: which run it is, what to do before it, the start's picture over the live cameras, and marks.
import { $, say } from "./shared.js";

export const MARKS = ["score", "redo"]; // beside success and failure

let images = [];

export function openTrials(about, live) {
  document.body.classList.add("trials");
  $("marks").hidden = false;
  images = about.cameras.map((name) => {
    const image = document.createElement("img");
    image.alt = `the start, as ${name} saw it`;
    image.hidden = true;
    image.onerror = () => image.removeAttribute("src");
    $(`camera-${name}`).after(image);
    return { image, name };
  });
  $("value").oninput = () => { $("score").textContent = `Score ${Number($("value").value).toFixed(2)}`; };
  $("score").onclick = () => live.tell({ order: "score", value: Number($("value").value) });
  $("redo").onclick = () => live.tell({ order: "redo" });
  $("home").onclick = () => live.tell({ order: "home" });
  $("undo").onclick = () => { $("once_more").hidden = false; };
  $("once_more").onclick = () => {
    $("once_more").hidden = true;
    live.tell({ order: "undo" });
  };
  $("strength").oninput = () => $("cameras").style.setProperty("--strength", $("strength").value / 100);
  $("blink").onchange = () => $("cameras").classList.toggle("blink", $("blink").checked);
}

export function showTrial({ mode, trial, emergency }) {
  $("trial").hidden = !trial;
  if (!trial) return;
  say("number", `Trial ${trial.trial} of ${trial.trials}, run ${trial.run} of ${trial.runs}`);
  say("words", { RESET: trial.reset, MARK: trial.mark }[mode] ?? "");
  const resets = mode === "RESET";
  $("home").hidden = !(resets && trial.home);
  $("home").disabled = emergency;
  $("undo").hidden = !(resets && trial.undo);
  if (!resets) $("once_more").hidden = true;
  $("overlay").hidden = !(resets && trial.starts.length);
  const which = `${trial.trial}.${trial.run}`;
  images.forEach(({ image, name }, index) => {
    const shows = resets && trial.starts.includes(name);
    if (shows && image.dataset.which !== which) image.src = `start/${index}?${which}`;
    image.dataset.which = which;
    image.hidden = !shows || !image.hasAttribute("src");
  });
}
