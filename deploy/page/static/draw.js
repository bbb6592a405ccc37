// Pictures with what the policy plans on them, and a plot for every dimension of a command.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function sharp(canvas, ratio) {
  // As many pixels as the screen has, whatever the layout says.
  const scale = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * scale));
  const height = Math.max(1, Math.round(width * ratio));
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  return scale;
}

const future = (state) => {
  // The chunk's commands from the present control step on, as [control step, …values].
  if (!state.chunk || !state.step) return [];
  const rows = state.chunk.actions.map((action, index) => [state.chunk.from + index, ...action]);
  return rows.filter((row) => row[0] >= state.step.command_step);
};

function line(context, points, { stroke, width, dash = [] }) {
  if (!points.length) return;
  context.beginPath();
  points.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.strokeStyle = stroke;
  context.lineWidth = width;
  context.setLineDash(dash);
  context.stroke();
  context.setLineDash([]);
}

function dot(context, [x, y], radius, fill) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fillStyle = fill;
  context.fill();
}

function shape(context, polygons, [x, y, angle], fill) {
  context.fillStyle = fill;
  const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
  polygons.forEach((corners) => {
    context.beginPath();
    corners.forEach(([u, v], index) => {
      const at = [x + cos * u - sin * v, y + sin * u + cos * v];
      if (index) context.lineTo(...at);
      else context.moveTo(...at);
    });
    context.closePath();
    context.fill();
  });
}

export function drawBoard(canvas, board, world, target = null) {
  // PushT, in its own pixels; world: the finger's place, then the block's pose; target: where the finger is to go.
  const context = canvas.getContext("2d");
  context.setTransform(canvas.width / board.size, 0, 0, canvas.height / board.size, 0, 0);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, board.size, board.size);
  shape(context, board.polygons, board.goal, "#9be29b");
  shape(context, board.polygons, world.slice(2), "#778899");
  dot(context, world, board.radius, "#4169e1");
  if (target) dot(context, target, 4, "#c01f1f");
  context.setTransform(1, 0, 0, 1, 0, 0);
  canvas.dataset.finger = world.slice(0, 2); // for whoever cannot see it
  canvas.dataset.block = world.slice(2);
}

export function drawPicture(canvas, picture, plane, state) {
  const ratio = picture ? picture.height / picture.width : plane ? plane.size[1] / plane.size[0] : 0.75;
  const scale = sharp(canvas, ratio);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (!plane) return;
  if (!picture && !plane.camera && plane.board && state.scene) drawBoard(canvas, plane.board, state.scene);
  const place = ([, x, y]) => [(x / plane.size[0]) * canvas.width, (y / plane.size[1]) * canvas.height];
  const trail = state.trail.slice(-20).map(place);
  const planned = future(state).map(place);
  line(context, trail, { stroke: colour("--accent"), width: 2 * scale });
  line(context, [...trail.slice(-1), ...planned], { stroke: colour("--chunk"), width: 2 * scale, dash: [4 * scale, 3 * scale] });
  planned.forEach((point) => dot(context, point, 2.5 * scale, colour("--chunk")));
  if (state.setpoint) dot(context, place([0, ...state.setpoint]), 4 * scale, colour("--accent"));
  canvas.dataset.planned = planned.length; // for whoever cannot see it
}

export function drawPlot(canvas, index, { low, high, rate }, state) {
  const scale = sharp(canvas, 0.34);
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  if (!state.step) return;
  const now = state.step.command_step;
  const [past, ahead] = [5 * rate, 2.5 * rate];
  const margin = 3 * scale;
  const x = (step) => ((step - now + past) / (past + ahead)) * width;
  const y = (value) => height - margin - ((value - low) / (high - low || 1)) * (height - 2 * margin);
  line(context, [[x(now), 0], [x(now), height]], { stroke: colour("--line"), width: scale });
  const place = (row) => [x(row[0]), y(row[index + 1])];
  line(context, state.trail.map(place), { stroke: colour("--accent"), width: 1.5 * scale });
  line(context, future(state).map(place), { stroke: colour("--chunk"), width: 1.5 * scale, dash: [4 * scale, 3 * scale] });
  context.fillStyle = colour("--faint");
  context.font = `${11 * scale}px system-ui, sans-serif`;
  const label = (text, align, baseline, left, top) => {
    [context.textAlign, context.textBaseline] = [align, baseline];
    context.fillText(text, left, top);
  };
  const digits = [3, 4, 5, 6, 7].find((n) => short(low, n) !== short(high, n)) ?? 3; // 0.999 to 1.001 are two numbers
  label(short(high, digits), "left", "top", 0, 2 * scale);
  label(short(low, digits), "left", "bottom", 0, height);
  label("now", "left", "bottom", x(now) + 3 * scale, height);
  label("+2.5 s", "right", "bottom", width, height);
}

const short = (value, digits) => (Math.abs(value) >= 100 ? value.toFixed(digits - 3) : value.toPrecision(digits));
