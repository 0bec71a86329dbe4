// Steps through a rollout: the text after each action, and what is known of that action.

class Stepper {
  constructor(panel, rollouts) {
    this.panel = panel;
    this.rollouts = rollouts;
    this.text = document.getElementById("stepper-text");
    this.said = document.getElementById("stepper-said");
    this.strip = document.getElementById("stepper-strip");
    this.choices = [...document.querySelectorAll("[data-rollout]")];
    this.choices.forEach((choice, index) => choice.addEventListener("click", () => {
      this.choose(index);
      this.panel.scrollIntoView({ block: "nearest" });
      this.panel.focus({ preventScroll: true });
    }));
    this.buttons = Object.fromEntries([...panel.querySelectorAll("[data-step]")].map((button) => [button.dataset.step, button]));
    for (const [step, button] of Object.entries(this.buttons)) button.addEventListener("click", () => this.step(step));
    panel.addEventListener("keydown", (event) => this.key(event));
    // Begin where something is taken back, if anything is.
    const backspaces = rollouts.map(([, actions]) => actions.findIndex(([kind]) => kind === "backspace"));
    const first = Math.max(0, backspaces.findIndex((at) => at >= 0));
    this.choose(first);
    this.show(backspaces[first] + 1);
  }

  choose(index) {
    this.index = index;
    this.choices.forEach((choice, each) => choice.setAttribute("aria-pressed", String(each === index)));
    const [, actions] = this.rollouts[index];
    this.chips = actions.map((action, at) => {
      const chip = html("button", "", label(action));
      chip.type = "button";
      chip.tabIndex = -1; // the arrow keys reach it
      chip.addEventListener("click", () => this.show(at + 1));
      if (action[0] === "write" && !action[2]) chip.classList.add("gone", action[6]);
      if (action[3]) chip.classList.add("noise");
      return chip;
    });
    this.strip.replaceChildren(...this.chips);
    this.show(0);
  }

  // done: actions that have been taken.
  show(done) {
    this.done = done;
    const [prompt, actions] = this.rollouts[this.index];
    const stack = [], tokens = [];
    actions.slice(0, done).forEach(([kind, text, , noise, , , shade], at) => {
      if (kind === "write") {
        stack.push(tokens.length);
        tokens.push({ text, shade, noise, gone: false, now: at === done - 1 });
      } else if (kind === "backspace") {
        const taken = tokens[stack.pop()];
        taken.gone = true;
        taken.now = at === done - 1;
      }
    });
    this.text.replaceChildren(html("span", "prompt", prompt));
    for (const token of tokens) {
      const classes = [token.gone ? `gone ${token.shade}` : "", token.noise ? "noise" : "", token.now ? "now" : ""];
      this.text.append(html("span", classes.filter(Boolean).join(" "), token.text));
    }
    const taken = tokens.find((token) => token.now && token.gone);
    this.said.textContent = done === 0 ? `${actions.length} actions; → takes the first one` : describe(actions[done - 1], done, actions.length, taken);
    this.chips.forEach((chip, at) => chip.classList.toggle("faint", at >= done));
    this.chips.forEach((chip, at) => (at === done - 1 ? chip.setAttribute("aria-current", "step") : chip.removeAttribute("aria-current")));
    const current = this.chips[done - 1];
    // Not scrollIntoView, which would scroll the page too.
    if (current) this.strip.scrollTop = current.offsetTop - this.strip.offsetTop - this.strip.clientHeight / 2;
    this.buttons.first.disabled = this.buttons.back.disabled = done === 0;
    this.buttons.on.disabled = this.buttons.last.disabled = done === actions.length;
  }

  step(name) {
    const last = this.rollouts[this.index][1].length;
    const to = { first: 0, back: this.done - 1, on: this.done + 1, last }[name];
    this.show(Math.min(last, Math.max(0, to)));
  }

  key(event) {
    const steps = { ArrowLeft: "back", ArrowRight: "on", Home: "first", End: "last" };
    const others = { ArrowUp: -1, ArrowDown: 1 };
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in steps) this.step(steps[event.key]);
    else if (event.key in others) this.choose(Math.min(this.rollouts.length - 1, Math.max(0, this.index + others[event.key])));
    else return;
    event.preventDefault();
  }
}

function label([kind, text]) {
  if (kind === "backspace") return "⌫";
  if (kind === "end") return "end";
  return text.replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅";
}

function describe([kind, text, , noise, logprob, version], at, count, taken) {
  const what = kind === "backspace" ? `takes back “${taken.text}”` : kind === "end" ? "ends the text" : `writes “${text}”`;
  const probability = Math.exp(logprob);
  const percent = probability >= 0.0995 || probability === 0 ? (100 * probability).toFixed(0) : (100 * probability).toPrecision(2);
  const chosen = noise ? " (the noise; the policy had chosen another token, whose probability this is)" : "";
  return `Action ${at} of ${count} ${what}${chosen}: log-probability ${format(logprob)} nats, ${percent} %, weights v${version}`;
}

const panel = document.getElementById("stepper");
if (panel) new Stepper(panel, JSON.parse(document.getElementById("rollout-data").textContent));
