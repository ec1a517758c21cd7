// An answer as it is written: server-sent events, in the form of OpenAI's chunks.
import { ask, ServerError } from "./api.js";
import { say } from "./words.js";

// Every chunk of an answer. Raises ServerError, and AbortError where `signal` says to stop.
export async function* streamAnswer(body, signal) {
  const response = await ask("/v1/chat/completions", { body, signal });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message);
    yield chunk;
  }
  throw new ServerError(say("broken_off"));
}

// The data of every event, wherever the pieces of the body are cut.
export async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6).replace(/\r$/, "");
    }
  } catch (error) {
    if (error.name === "AbortError" || signal?.aborted) throw error;
    throw new ServerError(say("broken_off"));
  } finally {
    reader.cancel().catch(() => {});
  }
}
