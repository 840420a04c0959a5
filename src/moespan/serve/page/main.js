import { byId } from "./dom.js";
import { Panel } from "./panel.js";
import { Talk } from "./talk.js";
import { switchLanguage, translate, word } from "./words.js";

const model = { id: "" };
new Talk(model);
const panel = new Panel(model);

function showLanguage() {
  const button = byId("language");
  button.textContent = word("language");
  button.setAttribute("aria-label", word("languageLabel"));
}

byId("language").addEventListener("click", () => {
  switchLanguage();
  showLanguage();
  panel.draw();
});

translate();
showLanguage();
byId("question").focus();
