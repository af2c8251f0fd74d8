// Pictures of the page, for docs/images and for whoever changes its looks.

// What the bundled model has learnt to answer, and a seed with which it does: the same text every time.
const HELLO = "Ciao, come ti chiami?", STORY = "Raccontami una storia breve su un gatto.", RHYME = "Scrivi una filastrocca sulla neve.";
const SEED = "7";

export const SHOTS = [
  { name: "light", scheme: "light", width: 1180, height: 860, questions: [HELLO, STORY, RHYME] },
  { name: "dark", scheme: "dark", width: 1180, height: 860, questions: [HELLO, STORY, RHYME], panel: true },
  { name: "narrow-light", scheme: "light", width: 390, height: 780, scale: 2, questions: [HELLO, RHYME] },
  { name: "narrow-dark", scheme: "dark", width: 390, height: 780, scale: 2, questions: [HELLO, RHYME] },
];

// One short conversation in every form; returns the files' paths.
export async function shoot(browser, url, out) {
  const files = [];
  for (const shot of SHOTS) {
    const context = await browser.createBrowserContext(), page = await context.newPage();
    await page.setViewport({ width: shot.width, height: shot.height, deviceScaleFactor: shot.scale ?? 1 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: shot.scheme }, { name: "prefers-reduced-motion", value: "reduce" }]);
    await page.evaluateOnNewDocument(() => Object.defineProperty(navigator, "language", { get: () => "it-IT" }));
    await page.goto(url);
    await page.screenshot({ path: `${out}/${shot.name}-blank.png` });
    await page.click("#tune");
    await page.type("#seed", SEED);
    await page.keyboard.press("Tab");
    if (!shot.panel) await page.click("#tune");
    await page.mouse.move(0, 0);
    for (const question of shot.questions) {
      await page.type("#input", question);
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => document.querySelector("#send").textContent === "Invia" && document.querySelector(".again"), { timeout: 60000 });
    }
    const path = `${out}/${shot.name}.png`;
    await page.screenshot({ path });
    files.push(path);
    await context.close();
  }
  return files;
}
