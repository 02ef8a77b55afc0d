// What an admin may do: a token with scope admin brings the buttons. It is kept until the page is loaded anew, and no longer.

import { html, say } from "./drawing.js";

let token = null;
export let allowed = false;
const headers = () => (token ? { authorization: `Bearer ${token}` } : {});

/** Ask for a change; return the console's sentence on it, and whether it was made. */
async function change(what, body) {
  try {
    const answer = await fetch(`/api/admin/${what}`, { method: "POST", headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(body) });
    return { done: answer.ok, text: await answer.text() };
  } catch {
    return { done: false, text: "no answer: the connection is broken" };
  }
}

/**
 * A button that asks for a change, and the sentence that answers; `body()` is what to send, or a text: why nothing is.
 * `title()` and `what()` may change: `refresh` of the element shows that.
 */
export function changeButton(title, busy, what, body, after = () => {}) {
  const button = html("button", { type: "button", class: "act" }, title());
  const answer = html("p", { class: "answer", role: "status" });
  button.addEventListener("click", async () => {
    const asked = body();
    if (typeof asked === "string") return say(answer, asked);
    button.disabled = true;
    say(button, busy);
    say(answer, "");
    const { done, text } = await change(what(), asked);
    button.disabled = false;
    await after();
    say(button, title());
    say(answer, text.trim());
    answer.classList.toggle("bad", !done || text.startsWith("error"));
  });
  const element = html("div", { class: "datagram" }, button, answer);
  element.refresh = () => button.disabled || say(button, title());
  return element;
}

/** The form in which the token is given; `onChange` is called when there are buttons, or none any more. */
export function adminForm(place, onChange) {
  const field = html("input", { type: "password", autocomplete: "off", spellcheck: "false", id: "token" });
  const answer = html("p", { role: "status" });
  const give = html("button", { class: "act" }, "Give it");
  const form = html("form", {}, html("label", { for: "token" }, "Token with scope admin"), field, give);
  const back = html("button", { type: "button", class: "act" }, "Forget it");
  back.hidden = true;
  place.append(form, back, answer);

  async function look(quiet) {
    let right = false;
    give.disabled = true; // one token at a time
    try {
      const found = await fetch("/api/rights", { headers: headers() });
      right = found.ok && (await found.json()).admin;
    } catch {
      return say(answer, quiet ? "" : "no answer: the connection is broken");
    } finally {
      give.disabled = false;
    }
    if (!right) token = null;
    allowed = right;
    form.hidden = right;
    back.hidden = !token;
    say(answer, right ? "Pages of collectors and streams have buttons now." : quiet ? "" : "This token is not known, or it lacks scope admin.");
    onChange();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    token = field.value.trim() || null;
    field.value = "";
    look(false);
  });
  back.addEventListener("click", () => {
    token = null;
    look(true);
  });
  look(true); // beyond this host the browser has shown a token already
}
