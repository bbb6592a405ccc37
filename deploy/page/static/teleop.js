// A session's page: draws what the socket brings, and says thirty times a second where the pointer is and which keys
// are down. It decides nothing: the loop on the other end does, and goes on without it.

import { drawBoard, sharp } from "./draw.js";
import { $, admitted, decoded, Live, pointed, REPORT, say } from "./shared.js";
import { isSet, openStop } from "./stop.js";

const NAMES = { READY: "ready", COUNTDOWN: "get ready", RECORDING: "recording", OVER: "keep or discard?" };
const BACKLOG = 4096; // bytes on their way from which on words are left out
const HELD = /^([wasdrfzxtgcv]|Arrow(Up|Down|Left|Right))$/;
const PRESSED = /^([ku+=_-]| |Enter|Backspace)$/;

const live = new Live(show, picture);
let about = null;
let state = null;
let pointer = null;
let down = new Set();
let pressed = [];
let released = [];

async function begin() {
  about = await admitted();
  $("session").hidden = false;
  $("task").textContent = about.task;
  $("help").textContent = about.help;
  $("arm").hidden = !about.emergency;
  if (about.emergency) openStop();
  live.open(ended);
}

function ended() {
  if (!state) return;
  say("message", `${state.episodes} ${state.episodes === 1 ? "episode" : "episodes"} saved. This page can be closed.`);
}

function show(next) {
  state = next;
  say("mode", state.mode === "RECORDING" && !state.driven ? "paused" : NAMES[state.mode]);
  say("episodes", `${state.episodes}${state.wanted ? ` of ${state.wanted}` : ""} episodes`);
  const score = state.score ?? state.mean_score;
  say("score", score == null ? `step ${state.step}` : `${state.score == null ? "mean " : ""}score ${score.toFixed(2)}, step ${state.step}`);
  say("message", state.message);
  $("watching").hidden = state.drives;
  $("countdown").hidden = state.countdown == null;
  $("countdown").textContent = Math.ceil(state.countdown ?? 0);
  $("start").disabled = state.mode !== "READY" || isSet();
  $("start").title = isSet() ? "the emergency stop is set: clear it first" : "";
  $("keep").disabled = !["RECORDING", "OVER"].includes(state.mode);
  $("discard").disabled = state.mode === "READY";
  $("undo").disabled = state.mode !== "READY" || !state.episodes;
  $("board").classList.toggle("driven", state.mode === "RECORDING" && state.driven);
  $("board").classList.toggle("paused", state.mode === "RECORDING" && !state.driven);
  if (about.board) {
    sharp($("board"), 1);
    drawBoard($("board"), about.board, state.state, state.target);
  }
}

async function picture(data) {
  const image = await decoded(data);
  sharp($("board"), 1);
  $("board").getContext("2d").drawImage(image, 0, 0, $("board").width, $("board").height);
  image.close();
}

function point(event) {
  const size = about?.board?.size ?? 1;
  pointer = pointed(event, $("board"), [size, size]);
}

const tell = (message) => live.tell(message, BACKLOG);

function word() {
  if (!about || document.hidden) return;
  tell({ pointer: about.points ? pointer : null, down: [...down], pressed });
  pressed = [];
  released.forEach((key) => down.delete(key)); // not before: a short tap counts
  released = [];
}

function let_go() {
  down = new Set();
  pointer = null;
}

$("board").addEventListener("pointerdown", (event) => {
  event.preventDefault();
  $("board").setPointerCapture(event.pointerId);
  point(event);
});
window.addEventListener("pointermove", (event) => {
  if (event.pointerType === "mouse" || event.buttons) point(event);
});
["pointerup", "pointercancel"].forEach((kind) => window.addEventListener(kind, (event) => {
  if (event.pointerType !== "mouse") pointer = null; // a finger that was lifted holds nothing
}));
document.documentElement.addEventListener("pointerleave", (event) => {
  if (event.pointerType === "mouse" && !event.buttons) pointer = null;
});
window.addEventListener("blur", () => { down = new Set(); });
document.addEventListener("visibilitychange", () => { if (document.hidden) { let_go(); } });

document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!HELD.test(key) && !PRESSED.test(key)) return;
  event.preventDefault();
  if (HELD.test(key)) {
    down.add(key);
    released = released.filter((other) => other !== key);
  }
  else if (!event.repeat) pressed.push(key);
});
document.addEventListener("keyup", (event) => {
  released.push(event.key.length === 1 ? event.key.toLowerCase() : event.key);
});

["start", "keep", "discard", "undo", "finish"].forEach((order) => {
  $(order).onclick = () => { $(order).blur(); tell({ order }); };
});
setInterval(word, REPORT);
begin();
