// Talks to the server: JSON answers, and streams of events.

/** An answer other than 200, with the server's own message; status 0 if there was no answer. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Relative addresses, so that the page also works behind a proxy that serves it below a path.
async function send(path, body, signal) {
  const options = body === undefined ? { signal } : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  };
  try {
    return await checked(await fetch(path, options));
  } catch (error) {
    throw error instanceof TypeError ? new Refused(0, "") : error;  // fetch's word for a broken network
  }
}

async function checked(response) {
  if (response.ok) return response;
  let message = response.statusText;
  try { message = (await response.json()).error.message; } catch { /* not ours: a proxy's page */ }
  throw new Refused(response.status, message || `HTTP ${response.status}`);
}

/** The decoded answer to GET, or to POST where there is a body. */
export const ask = async (path, body, signal) => (await send(path, body, signal)).json();

/** The events of a stream, decoded. Throws where the stream breaks or reports an error. */
export async function* events(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, "");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(0, event.error.message);
      yield event;
    }
  }
}
