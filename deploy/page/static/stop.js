// The emergency stop, for every page: a socket of its own to a process of its own, and a request beside it. What is
// shown is what the arm's process did, not what was sent.

const $ = (id) => document.getElementById(id);
const LATE = 1000; // ms after which a stop that nobody confirms is no stop
const AGAIN = 500; // ms until a lost connection is tried again
const SILENCE = 2000; // ms without a word after which the stop counts as out of reach
const OVER = 1012; // with which a socket is closed when the run is over
const OWN = "Use the robot’s own emergency stop, now.";

let socket = null;
let heard = 0;
let asked = null; // when this page asked for a stop that is not yet confirmed, ms
let arrived = false;
let request = null;
let over = false;

export function openStop() {
  heard = performance.now();
  connect();
  $("emergency").onclick = stop;
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") stop(); });
  $("clear").onclick = () => { $("confirm").hidden = false; };
  $("confirm").onclick = () => {
    $("confirm").hidden = true;
    fetch("clear", { method: "POST", body: "the area is safe" });
  };
  setInterval(watch, 100);
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/stop`);
  socket.onmessage = ({ data }) => { heard = performance.now(); over = false; told(JSON.parse(data)); };
  socket.onclose = ({ code }) => {
    over = over || code === OVER;
    setTimeout(connect, AGAIN);
  };
}

function stop() {
  if (asked == null) [asked, arrived] = [performance.now(), false]; // what was heard before is no answer
  if (socket.readyState === WebSocket.OPEN) socket.send("stop");
  request = new AbortController(); // a browser may keep it waiting: it must not come when the stop has been cleared
  fetch("emergency", { method: "POST", signal: request.signal }).catch(() => null);
  say("Stop sent …", "");
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
    say(`Stop confirmed: the arm began to stop within ${took} ms of the click.${late}`, late && "bad");
  } else if (asked == null && !emergency) say("", "");
}

function watch() {
  $("unreachable").hidden = over || performance.now() - heard < SILENCE;
  if (asked == null || performance.now() - asked < LATE) return;
  if (socket.readyState === WebSocket.OPEN && !arrived) socket.send("stop"); // it may be there by now
  const why = arrived ? "the stop arrived, but the arm’s process does not answer" : "the stop did not arrive";
  say(`THE STOP IS NOT CONFIRMED: ${why}. ${OWN}`, "alarm");
}

function say(text, kind) {
  const line = $("confirmed");
  if (line.textContent !== text) line.textContent = text; // who listens to the page hears changes only
  line.className = kind;
}
