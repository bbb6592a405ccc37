// What the pages of a run have in common: who may come in, sockets that come back, words, pictures and pointers.

const AGAIN = 500; // ms until a lost connection is tried again
const OVER = 1012; // with which a socket is closed when the run is over
const SILENCE = 1500; // ms without a word after which the connection counts as lost
export const REPORT = 33; // ms between two words of where somebody points

export const $ = (id) => document.getElementById(id);

export function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // who listens to the page hears changes only
}

export async function admitted() {
  // What the run says of itself, once whoever is at this browser may come in.
  for (;;) {
    const answer = await fetch("about").catch(() => null);
    if (answer?.ok) {
      const about = await answer.json();
      $("enter").hidden = true;
      return about;
    }
    await new Promise(answer?.status === 401 ? ask : (done) => setTimeout(done, AGAIN));
  }
}

function ask(done) {
  // For the token.
  $("enter").hidden = false;
  $("enter").onsubmit = async (event) => {
    event.preventDefault();
    const headers = { Authorization: `Api-Key ${$("token").value}` };
    const answer = await fetch("session", { method: "POST", headers });
    $("refused").textContent = answer.ok ? "" : "not this one";
    if (answer.ok) done();
  };
}

export class Connection {
  // A socket to `path` that opens again whenever it was closed.
  over = false; // it was closed because the run is over
  #heard = performance.now();
  #path;
  #take;
  #socket = null;

  constructor(path, take) {
    [this.#path, this.#take] = [path, take];
  }

  open(ended = () => null) {
    this.#socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${this.#path}`);
    this.#socket.binaryType = "arraybuffer";
    this.#socket.onmessage = ({ data }) => {
      this.#heard = performance.now();
      this.over = false;
      this.#take(data);
    };
    this.#socket.onclose = ({ code }) => {
      this.over = this.over || code === OVER;
      if (this.over) ended();
      setTimeout(() => this.open(ended), AGAIN);
    };
  }

  get silence() {
    // ms without a word.
    return performance.now() - this.#heard;
  }

  send(text, most = Infinity) {
    // If it is open, and fewer than `most` bytes wait to be sent.
    const { readyState, bufferedAmount } = this.#socket ?? {};
    if (readyState === WebSocket.OPEN && bufferedAmount < most) this.#socket.send(text);
  }
}

export class Live extends Connection {
  // What changes, `show`, pictures, `take`, and orders; the page says where it is lost.
  constructor(show, take) {
    super("/live", (data) => (typeof data === "string" ? show(JSON.parse(data)) : take(data)));
    setInterval(() => { $("lost").hidden = this.over || !$("enter").hidden || this.silence < SILENCE; }, 100);
  }

  tell(message, most) {
    this.send(JSON.stringify(message), most);
  }
}

export const decoded = (jpeg) => createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));

export function pointed(event, canvas, size) {
  // Where a pointer is on `canvas`, or nearest to it, in units of which `size` are its width and height.
  const box = canvas.getBoundingClientRect();
  const share = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return share.map((value, axis) => size[axis] * Math.min(1, Math.max(0, value)));
}
