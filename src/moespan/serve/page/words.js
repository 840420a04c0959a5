// Every word of the page, in English and Chinese.

const WORDS = {
  en: {
    skip: "Skip to the question", talk: "Conversation", mode: "Kind of prompt", chat: "Chat", completion: "Completion",
    clear: "New", answers: "Answers", question: "Your prompt", questionHint: "Ask something. Enter sends, Shift+Enter starts a new line.",
    send: "Send", stop: "Stop", retry: "Try again", copy: "Copy", copied: "Copied", parameters: "Parameters",
    panel: "Live view", load: "Load", layout: "Layout", experts: "Experts", time: "Time",
    you: "You", model: "Model", prompt: "Prompt",
    system: "System message", temperature: "Temperature", topP: "Top p", maxTokens: "Most tokens", seed: "Seed",
    stopStrings: "Stop at (one a line)", alternatives: "Alternatives of each token",
    tokensOfPrompt: (count) => `${count} tokens`, noTokens: "",
    done: (tokens, first, rate) => `${tokens} tokens · first after ${first} s · ${rate} tokens/s`,
    cut: "cut at the limit of tokens", stopped: "stopped", failed: "failed", finished: "The answer is complete.",
    running: "running", waiting: "waiting", kv: "KV cache in use", rate: "tokens/s", restarts: "restarts", live: "open requests",
    prefix: "prompt tokens from cache", uptime: "up for",
    node: (number) => `node ${number}`, stage: (number) => `stage ${number}`, replica: (number) => `replica ${number}`,
    rank: (number, place) => `rank ${number}: ${place}`, behind: "behind", silent: (seconds) => `silent for ${seconds} s`,
    curve: (rate) => `tokens per second over the last two minutes, now ${rate}`,
    heat: (layers, experts) => `${layers} layers (rows) × ${experts} experts (columns); brighter: more tokens`,
    ready: "ready", starting: "The model is being loaded.", overloaded: "The queue is full: new requests get 429 and should come again.",
    recovering: "The ranks have died and are being started again. Requests get 503 until then.",
    draining: "The server is ending: running requests finish, new ones get 503.", ended: "The server has ended.",
    unreachable: "The server cannot be reached. The page tries again every few seconds.",
    unauthorised: "The server wants a key. Reload the page and give the key as password; any user name will do.",
    trouble: (who) => `The engine is stalled: ${who}. Requests get 503.`,
    lost: "The connection broke before the answer was complete.", language: "中文", languageLabel: "Switch to Chinese",
  },
  zh: {
    skip: "跳到输入框", talk: "对话", mode: "提示词类型", chat: "对话", completion: "续写",
    clear: "新对话", answers: "回答", question: "提示词", questionHint: "请输入问题。Enter 发送，Shift+Enter 换行。",
    send: "发送", stop: "停止", retry: "重试", copy: "复制", copied: "已复制", parameters: "参数",
    panel: "实时状态", load: "负载", layout: "并行布局", experts: "专家", time: "时间",
    you: "你", model: "模型", prompt: "提示词",
    system: "系统消息", temperature: "温度", topP: "Top p", maxTokens: "最多词元数", seed: "随机种子",
    stopStrings: "停止字符串（每行一个）", alternatives: "显示每个词元的备选",
    tokensOfPrompt: (count) => `${count} 个词元`, noTokens: "",
    done: (tokens, first, rate) => `${tokens} 个词元 · 首个用时 ${first} 秒 · ${rate} 词元/秒`,
    cut: "达到词元上限而截断", stopped: "已停止", failed: "失败", finished: "回答完成。",
    running: "运行中", waiting: "排队", kv: "KV 缓存占用", rate: "词元/秒", restarts: "重启次数", live: "未完成的请求",
    prefix: "命中前缀缓存的词元", uptime: "已运行",
    node: (number) => `节点 ${number}`, stage: (number) => `第 ${number} 级`, replica: (number) => `副本 ${number}`,
    rank: (number, place) => `rank ${number}：${place}`, behind: "落后", silent: (seconds) => `${seconds} 秒无响应`,
    curve: (rate) => `最近两分钟的每秒词元数，当前 ${rate}`,
    heat: (layers, experts) => `${layers} 层（行）× ${experts} 个专家（列）；越亮表示词元越多`,
    ready: "就绪", starting: "正在加载模型。", overloaded: "队列已满：新请求得到 429，请稍后再试。",
    recovering: "计算进程已退出，正在重新启动；期间请求得到 503。",
    draining: "服务正在结束：进行中的请求会完成，新请求得到 503。", ended: "服务已结束。",
    unreachable: "无法连接服务，页面每隔几秒重试。",
    unauthorised: "服务需要密钥。请刷新页面，把密钥填在密码栏，用户名任意。",
    trouble: (who) => `引擎停滞：${who}。请求得到 503。`,
    lost: "回答完成之前连接断开了。", language: "English", languageLabel: "切换到英文",
  },
};

const stored = () => { try { return localStorage.getItem("language"); } catch { return null; } };
let language = stored() ?? (navigator.language.startsWith("zh") ? "zh" : "en");

/** The word for `key`; words that depend on values are functions. */
export const word = (key, ...values) => {
  const found = WORDS[language][key];
  return typeof found === "function" ? found(...values) : found;
};

/** Put the words of the chosen language into every element that names one. */
export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const one of document.querySelectorAll("[data-word]")) one.textContent = word(one.dataset.word);
  for (const one of document.querySelectorAll("[data-word-label]")) one.setAttribute("aria-label", word(one.dataset.wordLabel));
  for (const one of document.querySelectorAll("[data-word-placeholder]")) one.placeholder = word(one.dataset.wordPlaceholder);
}

/** Change to the other language. */
export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  try { localStorage.setItem("language", language); } catch { /* the choice lasts until the page is left */ }
  translate();
}
