// Which models are served, and whether they are ready; asked again while one of them is not.
import { readModels, setKey } from "./api.js";
import { at } from "./dom.js";
import { say } from "./words.js";

const AGAIN_MS = 2000;

// `changed` is called with the list. Without a key that the server needs, its field is shown; other troubles are told.
export function watchModels(changed) {
  let timer;
  const read = async () => {
    clearTimeout(timer);
    try {
      const models = await readModels();
      at("key-form").hidden = true;
      at("trouble").hidden = true;
      changed(models);
      if (models.some((one) => one.state !== "ready")) timer = setTimeout(read, AGAIN_MS);
    } catch (error) {
      if (error.status === 401) askForKey(error.message);
      else {
        at("trouble").querySelector("span").textContent = error.message;
        at("trouble").hidden = false;
      }
    }
  };
  at("trouble").querySelector("button").addEventListener("click", read);
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(at("key").value.trim());
    at("key").value = "";
    tried = true;
    read();
  });
  read();
  return read;
}

let tried = false;

export function askForKey(why) {
  setKey(null);
  at("key-error").textContent = tried ? why : "";
  if (!at("key-form").hidden) return;
  at("key-form").hidden = false;
  at("key").focus();
}

export function stateWord(state) {
  return say({ loading: "state_loading", ready: "state_ready", broken: "state_broken" }[state] || "state_stopped");
}

// How a model is called in the choice.
export function labelOf(model) {
  const name = model.parent ? say("adapter_of", { name: model.id, parent: model.parent }) : model.id;
  if (model.task && model.task !== "causal") return say("not_chat", { name, task: model.task });
  return model.state === "ready" ? name : say("model_state", { name, state: stateWord(model.state) });
}

export const canChat = (model) => !model.task || model.task === "causal";
