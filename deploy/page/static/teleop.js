// A session's page: draws what the socket brings, and says thirty times a second where the pointer is and which keys
// are down. It decides nothing: the loop on the other end does, and goes on without it.

import { dot, drawBoard } from "./draw.js";
import { openStop } from "./stop.js";

const $ = (id) => document.getElementById(id);
const NAMES = { READY: "ready", COUNTDOWN: "get ready", RECORDING: "recording", OVER: "keep or discard?" };
const AGAIN = 500; // ms until a lost connection is tried again
const WORDS = 33; // ms between two words to the loop
const OVER = 1012; // with which a socket is closed when the session is over
const SILENCE = 1500; // ms without a word after which the connection counts as lost
const HELD = /^([wasdrfzxtgcv]|Arrow(Up|Down|Left|Right))$/;
const PRESSED = /^([ku+=_-]| |Enter|Backspace)$/;

let about = null;
let socket = null;
let state = null;
let pointer = null;
let down = new Set();
let pressed = [];
let released = [];
let heard = Date.now();
let over = false;

async function begin() {
  const answer = await fetch("about").catch(() => null);
  if (answer?.status === 401) return ask();
  if (!answer?.ok) return setTimeout(begin, AGAIN);
  about = await answer.json();
  $("enter").hidden = true;
  $("session").hidden = false;
  $("task").textContent = about.task;
  $("help").textContent = about.help;
  $("arm").hidden = !about.emergency;
  if (about.emergency) openStop();
  connect();
}

function ask() {
  $("enter").hidden = false;
  $("enter").onsubmit = async (event) => {
    event.preventDefault();
    const headers = { Authorization: `Api-Key ${$("token").value}` };
    const answer = await fetch("session", { method: "POST", headers });
    $("refused").textContent = answer.ok ? "" : "not this one";
    if (answer.ok) begin();
  };
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    heard = Date.now();
    over = false;
    if (typeof data === "string") show(JSON.parse(data));
    else picture(data);
  };
  socket.onclose = ({ code }) => {
    over = over || code === OVER;
    if (over && state) say("message", `${state.episodes} ${state.episodes === 1 ? "episode" : "episodes"} saved. This page can be closed.`);
    setTimeout(connect, AGAIN);
  };
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
  $("start").disabled = state.mode !== "READY";
  $("keep").disabled = !["RECORDING", "OVER"].includes(state.mode);
  $("discard").disabled = state.mode === "READY";
  $("undo").disabled = state.mode !== "READY" || !state.episodes;
  $("board").classList.toggle("driven", state.mode === "RECORDING" && state.driven);
  $("board").classList.toggle("paused", state.mode === "RECORDING" && !state.driven);
  if (about.board) draw(about.board, state);
}

function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // who listens to the page hears changes only
}

function sized(canvas) {
  // As many pixels as the screen has, whatever the layout says; a square.
  const width = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
  if (canvas.width !== width) canvas.width = canvas.height = width;
  return canvas.getContext("2d");
}

async function picture(data) {
  const image = await createImageBitmap(new Blob([data], { type: "image/jpeg" }));
  const context = sized($("board"));
  context.drawImage(image, 0, 0, $("board").width, $("board").height);
  image.close();
}

function draw(board, { state: world, target }) {
  const context = sized($("board"));
  const scale = $("board").width / board.size;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  drawBoard(context, board, world);
  if (target) dot(context, target, 4, "#c01f1f");
  $("board").dataset.finger = world.slice(0, 2); // for whoever cannot see it
  $("board").dataset.block = world.slice(2);
}

function point(event) {
  const box = $("board").getBoundingClientRect();
  const size = about?.board?.size ?? 1;
  const share = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  pointer = share.map((value) => size * Math.min(1, Math.max(0, value)));
}

const tell = (message) => {
  if (socket?.readyState === WebSocket.OPEN && socket.bufferedAmount < 4096) socket.send(JSON.stringify(message));
};

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
setInterval(word, WORDS);
setInterval(() => { $("lost").hidden = over || !$("enter").hidden || Date.now() - heard < SILENCE; }, 200);
begin();
