// The emergency stop, for every page: a socket of its own to a process of its own, and a request beside it. What is
// shown is what the arm's process did, not what was sent.

import { $, Connection, say } from "./shared.js";

const LATE = 1000; // ms after which a stop that nobody confirms is no stop
const SILENCE = 2000; // ms without a word after which the stop counts as out of reach
const OWN = "Use the robot’s own emergency stop, now.";

let connection = null;
let asked = null; // when this page asked for a stop that is not yet confirmed, ms
let arrived = false;
let request = null;

export const isSet = () => arrived;

export function openStop() {
  connection = new Connection("/stop", (data) => told(JSON.parse(data)));
  connection.open();
  $("emergency").onclick = stop;
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") stop(); });
  $("clear").onclick = () => { $("confirm").hidden = false; };
  $("confirm").onclick = () => {
    $("confirm").hidden = true;
    fetch("clear", { method: "POST", body: "the area is safe" });
  };
  setInterval(watch, 100);
}

function stop() {
  if (asked == null) [asked, arrived] = [performance.now(), false]; // what was heard before is no answer
  connection.send("stop");
  request = new AbortController(); // a browser may keep it waiting: it must not come when the stop has been cleared
  fetch("emergency", { method: "POST", signal: request.signal }).catch(() => null);
  confirmed("Stop sent …", "");
}

function told({ emergency, obeyed }) {
  $("stopped").hidden = !emergency;
  if (!emergency) $("confirm").hidden = true;
  arrived = emergency;
  if (asked != null && obeyed) {
    const took = Math.max(1, Math.round(performance.now() - asked));
    asked = null;
    request.abort();
    const late = took > LATE ? " That is too late: find out why before you go on." : "";
    confirmed(`Stop confirmed: the arm began to stop within ${took} ms of the click.${late}`, late && "bad");
  } else if (asked == null && !emergency) confirmed("", "");
}

function watch() {
  $("unreachable").hidden = connection.over || connection.silence < SILENCE;
  if (asked == null || performance.now() - asked < LATE) return;
  if (!arrived) connection.send("stop"); // it may be there by now
  const why = arrived ? "the stop arrived, but the arm’s process does not answer" : "the stop did not arrive";
  confirmed(`THE STOP IS NOT CONFIRMED: ${why}. ${OWN}`, "alarm");
}

function confirmed(text, kind) {
  say("confirmed", text);
  $("confirmed").className = kind;
}
