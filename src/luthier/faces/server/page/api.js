// The server: its models, its answers, its errors. The key stays in this tab's session, and goes nowhere else.
import { say } from "./words.js";

const KEY = "luthier.key";

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

// An answer that is an error, in the server's own sentence.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Raises ServerError, and AbortError where `signal` says to stop.
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(say("unreachable"));
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ServerError(said?.error?.message || say("http_error", { status: response.status }), response.status);
}

export async function readModels() {
  const response = await ask("/v1/models");
  return (await response.json()).data;
}
