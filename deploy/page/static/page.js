// The operator's page: shows what the socket brings, and sends orders. The emergency stop has a way of its own: stop.js.
import { drawPicture, drawPlot } from "./draw.js";
import { $, admitted, decoded, Live, pointed, REPORT, say } from "./shared.js";
import { openStop } from "./stop.js";
import { MARKS, openTrials, showTrial } from "./trial.js";

const NAMES = {
  OVER: "no episode", POLICY: "policy", PAUSED: "paused", PERSON: "you command", RESET: "set it up", MARK: "how was it?",
  STILL: "arm still", MOVING: "arm ready", STOPPING: "arm stopping", BROKEN: "arm broken", SILENT: "arm silent",
};
const ROWS = [
  ["observation_age_ms", "observation age, ms"], ["inference_ms", "inference, ms"], ["delay", "delay, control steps"],
  ["lateness_ms", "lateness of commands, ms"], ["period_ms", "period, ms"], ["jump", "jump where chunks meet"],
];
const ORDERS = ["start", "pause", "take_over", "success", "failure"];

const live = new Live(show, take);
let about = null;
let state = null;
let pictures = [];
let canvases = [];
let reported = 0;

async function begin() {
  about = await admitted();
  $("operating").hidden = false;
  build();
  owning();
  if (about.trials) openTrials(about, live);
  live.open(() => say("mode", "the run is over"));
  openStop();
}

function build() {
  $("task").textContent = about.task || "action-diffusion";
  document.title = `${about.task || "deploy"} – action-diffusion`;
  const shown = about.cameras.map((name) => ({ name, plane: about.plane?.camera === name ? about.plane : null }));
  if (about.plane && !about.plane.camera) shown.push({ name: "commands", plane: about.plane });
  $("cameras").hidden = !shown.length;
  $("cameras").replaceChildren();
  canvases = shown.map(({ name, plane }) => {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.id = `camera-${name}`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", name);
    const caption = document.createElement("figcaption");
    caption.textContent = name;
    figure.append(canvas, caption);
    $("cameras").append(figure);
    if (plane) ["pointerdown", "pointermove"].forEach((kind) => canvas.addEventListener(kind, (e) => point(e, plane)));
    return { canvas, plane };
  });
  $("plots").replaceChildren(...about.dimensions.map((name, index) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = about.units[index] ? `${name}, ${about.units[index]}` : name;
    const canvas = document.createElement("canvas");
    canvas.dataset.dimension = index;
    figure.append(caption, canvas);
    return figure;
  }));
}

function owning() {
  // A box for each part of the action that may be the person's while the policy has the others.
  $("owned").append(...about.parts.map((part) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.dataset.first = part[0];
    box.onchange = () => {
      const values = state.owned.map((mine, index) => Number(part.includes(index) ? box.checked : mine));
      if (values.some(Boolean)) live.tell({ order: "own", values });
    };
    const name = about.dimensions[part[0]];
    label.append(box, part.length > 1 ? name.replace(/\[.*/, "") : name);
    return label;
  }));
}

async function take(data) {
  const index = new Uint8Array(data, 0, 1)[0];
  const picture = await decoded(new Uint8Array(data, 1));
  pictures[index]?.close();
  pictures[index] = picture;
}

function show(next) {
  state = next;
  say("mode", NAMES[state.mode]);
  say("phase", NAMES[state.phase]);
  ["mode", "phase"].forEach((id) => { $(id).dataset.state = state[id]; });
  $("loop").hidden = state.loop;
  $("guard").hidden = !state.guard;
  if (state.guard) {
    const { level, alarm } = state.guard;
    say("guard", `${alarm ? "unusual" : "guard"} ${level == null ? "" : level.toFixed(1)}`);
    $("guard").dataset.state = alarm ? "ALARM" : level > 0.5 ? "UNUSUAL" : "USUAL";
  }
  if (about.trials) showTrial(state);
  const why = reasons();
  const orders = about.trials ? [...ORDERS.filter((order) => order !== "take_over"), ...MARKS] : ORDERS;
  orders.forEach((order) => { $(order).disabled = Boolean(why[order]); });
  const named = (reason) => orders.filter((order) => why[order] === reason).map((order) => $(order).textContent).join(", ");
  const reasoned = [...new Set(orders.map((order) => why[order]))].filter(Boolean);
  say("why", reasoned.map((reason) => `${named(reason)}: ${reason}`).join(" · "));
  say("advice", state.advice ?? "");
  $("owned").hidden = state.mode !== "PERSON" || about.parts.length < 2;
  document.querySelectorAll("#owned input").forEach((box) => {
    box.checked = state.owned[box.dataset.first];
    const part = about.parts.find(([first]) => first === Number(box.dataset.first));
    box.disabled = box.checked && part.length === state.owned.filter(Boolean).length; // the last one
  });
  $("hint").hidden = state.mode !== "PERSON";
  const where = about.teleop ? `as the ${about.teleop} says` : "where you point on the picture";
  $("hint").textContent = `You command: the arm goes ${where}. Start gives it back to the policy.`;
  $("timing").replaceChildren(...ROWS.map(([key, name]) => row(name, state.timing?.[key])));
  const { steps, missed, held, interventions } = state.totals;
  $("totals").textContent =
    `${missed} deadlines missed, ${held} of ${steps} steps held, ${interventions} interventions` +
    (state.step ? `; seed ${state.step.seed}, step ${state.step.step}` : "") +
    (state.step?.reward != null ? `, reward ${state.step.reward.toFixed(2)}` : "");
  $("events").replaceChildren(...state.events.map(event));
}

function reasons() {
  // Why a button is off; nothing where it is not.
  const over = ["OVER", "RESET"].includes(state.mode) && "no episode is under way";
  const asked = state.mode === "MARK" && "say first how the run went";
  const stopped = state.emergency && "the emergency stop is set: clear it first";
  const nothing = !(about.plane || about.teleop) && "start deploy with teleop=, there is nothing to point at";
  return {
    start: stopped || asked || (state.mode === "POLICY" && !state.guard?.alarm && "the policy commands") ||
      (about.trials && state.mode === "OVER" && over),
    pause: asked || (about.trials && over) || (state.mode === "PAUSED" && "it is paused"),
    take_over: stopped || nothing || over || (state.mode === "PERSON" && "you command"),
    ...Object.fromEntries(["success", "failure", ...MARKS].map((mark) => [mark, over])),
  };
}

function row(name, values) {
  const line = document.createElement("tr");
  const head = document.createElement("th");
  head.textContent = name;
  const cells = ["last", "median", "max"].map((key) => {
    const cell = document.createElement("td");
    cell.textContent = values ? values[key].toFixed(1) : "–";
    return cell;
  });
  line.append(head, ...cells);
  return line;
}

function event({ age, text, times }) {
  const line = document.createElement("li");
  const time = document.createElement("time");
  time.textContent = age < 90 ? `${age.toFixed(0)} s ago` : `${(age / 60).toFixed(0)} min ago`;
  line.append(time, text);
  if (times > 1) {
    const count = document.createElement("b");
    count.textContent = ` ×${times}`;
    line.append(count);
  }
  return line;
}

function draw() {
  if (state) {
    canvases.forEach(({ canvas, plane }, index) => {
      drawPicture(canvas, pictures[index], plane, state);
      canvas.classList.toggle("taken", Boolean(plane) && state.mode === "PERSON");
    });
    document.querySelectorAll("#plots canvas").forEach((canvas, index) => {
      drawPlot(canvas, index, { low: about.low[index], high: about.high[index], rate: about.control_rate }, state);
    });
  }
  setTimeout(() => requestAnimationFrame(draw), 50);
}

function point(event, plane) {
  if (state?.mode !== "PERSON" || Date.now() - reported < REPORT) return;
  reported = Date.now();
  live.tell({ order: "point", values: pointed(event, event.currentTarget, plane.size) });
}

ORDERS.forEach((order) => { $(order).onclick = () => live.tell({ order }); });
requestAnimationFrame(draw);
begin();
