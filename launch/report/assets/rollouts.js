"use strict";
// Steps through a rollout: the text after each action, and what is known of that action. Only text nodes are made of data.

const BOUNDS = [0.01, 0.1, 0.5, 0.9]; // probabilities of a deleted token between its colors

class Stepper {
  constructor(panel, rollouts) {
    this.rollouts = rollouts;
    this.text = document.getElementById("stepper-text");
    this.said = document.getElementById("stepper-said");
    this.choices = [...document.querySelectorAll("[data-rollout]")];
    this.choices.forEach((choice, index) => {
      const [prompt, actions] = rollouts[index];
      choice.querySelector(".text").replaceChildren(...spans(prompt, replay(actions)));
      choice.addEventListener("click", () => {
        this.choose(index);
        panel.scrollIntoView({ block: "nearest" });
        panel.focus({ preventScroll: true });
      });
    });
    this.buttons = [...panel.querySelectorAll("[data-step]")];
    for (const button of this.buttons) button.addEventListener("click", () => this.key(button.dataset.step));
    panel.addEventListener("keydown", (event) => {
      if (!event.altKey && !event.ctrlKey && !event.metaKey && this.key(event.key)) event.preventDefault();
    });
    this.choose(0);
  }

  choose(index) {
    this.index = Math.min(this.rollouts.length - 1, Math.max(0, index));
    this.choices.forEach((choice, each) => choice.setAttribute("aria-pressed", String(each === this.index)));
    this.show(0);
  }

  // Shows the text when `done` actions have been taken.
  show(done) {
    const [prompt, actions] = this.rollouts[this.index];
    this.done = Math.min(actions.length, Math.max(0, done));
    const tokens = replay(actions.slice(0, this.done)), current = tokens.find((token) => token.now);
    this.text.replaceChildren(...spans(prompt, tokens));
    this.said.textContent = this.done === 0 ? `${actions.length} actions; → takes the first one`
      : `Action ${this.done} of ${actions.length} ${describe(actions[this.done - 1], current)}`;
    for (const button of this.buttons) {
      button.disabled = this.done === (["Home", "ArrowLeft"].includes(button.dataset.step) ? 0 : actions.length);
    }
  }

  // Whether the key did anything.
  key(name) {
    const places = { ArrowLeft: this.done - 1, ArrowRight: this.done + 1, Home: 0, End: Infinity };
    const others = { ArrowUp: this.index - 1, ArrowDown: this.index + 1 };
    if (name in places) this.show(places[name]);
    else if (name in others) this.choose(others[name]);
    return name in places || name in others;
  }
}

// Every token that was written. now: the last action wrote it or took it back.
function replay(actions) {
  const stack = [], tokens = [];
  actions.forEach(([kind, text, noise, logprob], at) => {
    if (kind === "write") stack.push(tokens[tokens.push({ text, noise, logprob, gone: false }) - 1]);
    if (kind !== "end") stack.at(-1).now = at === actions.length - 1;
    if (kind === "backspace") stack.pop().gone = true;
  });
  return tokens;
}

function spans(prompt, tokens) {
  const shown = tokens.map(({ text, noise, logprob, gone, now }) => {
    const shade = BOUNDS.filter((bound) => Math.exp(logprob) > bound).length;
    return [text, `${gone ? `gone p${shade}` : ""} ${noise ? "noise" : ""} ${now ? "now" : ""}`];
  });
  return [[prompt, "prompt"], ...shown].map(([text, classes]) => {
    const element = document.createElement("span");
    element.className = classes;
    element.textContent = text;
    return element;
  });
}

function describe([kind, text, noise, logprob, version], token) {
  const what = kind === "backspace" ? `takes back “${token.text}”` : kind === "end" ? "ends the text" : `writes “${text}”`;
  const chosen = noise ? " (the noise; the policy had chosen another token, whose probability this is)" : "";
  const percent = 100 * Math.exp(logprob), digits = percent >= 10 || percent === 0 ? percent.toFixed(0) : percent.toPrecision(2);
  return `${what}${chosen}: log-probability ${String(logprob).replace("-", "−")} nats, ${digits} %, weights v${version}`;
}

const panel = document.getElementById("stepper");
if (panel) new Stepper(panel, JSON.parse(document.getElementById("rollout-data").textContent));
