// The page that one works in: the picture, the scores beside it, the list of pictures.
import { useSignal } from '@preact/signals'
import { useEffect, useRef } from 'preact/hooks'
import { anyQuery, type ApiError, api } from '../api'
import { keyTable, useKeys } from '../keys'
import { enqueue, newUid, overlaid, overlaidFlag } from '../outbox'
import { allowed, complete, given, missing, shown, stepped } from '../scores'
import { ScoreRow } from '../score_panel'
import { address, go, imageChanged, isAdmin, itemOf, listOpen, mayScore, measures, readImage, say, study } from '../state'
import type { ImageDetail, Item, Measure, Scores } from '../types'
import { Button, Chip, Dialog, Empty, Icon, Spinner } from '../ui'
import { Viewer, warm } from '../viewer'
import { WorkList, neighbour } from '../worklist'
import { ConsensusBox } from '../consensus'

export const draftSeen = (item: Item | null) => Boolean(item?.draft) && !item?.draft_hidden

/** Seconds that the page was in front since the clock was last asked, for the record of each score. */
function useClock(id: number): () => number {
  const clock = useRef({ since: performance.now(), spent: 0 })
  useEffect(() => {
    clock.current = { since: performance.now(), spent: 0 }
    const turn = () => {
      const now = performance.now()
      if (document.hidden) clock.current.spent += now - clock.current.since
      clock.current.since = now
    }
    document.addEventListener('visibilitychange', turn)
    return () => document.removeEventListener('visibilitychange', turn)
  }, [id])
  return () => {
    const now = performance.now()
    const seconds = (clock.current.spent + now - clock.current.since) / 1000
    clock.current = { since: now, spent: 0 }
    return Math.round(seconds * 100) / 100
  }
}

export function Review({ id }: { id: number | null }) {
  useEffect(() => { if (id === null) void first() }, [id])
  if (id === null) return <Nothing />
  return <ReviewOf id={id} />
}

async function first() {
  const still = address.value
  const next = await api.next(null, 'next', 'unscored').catch(() => null)
  const id = next?.id ?? (await api.images({ ...anyQuery }, 0, 1).catch(() => null))?.items[0]?.id
  if (id && address.value === still) go(`/review/${id}`)
}

function Nothing() {
  const none = (study.value?.counts.images ?? 0) === 0
  if (!none) return <div class="page"><Spinner /></div>
  return (
    <div class="page narrow"><Empty title="No pictures yet">
      <p>Add the pictures of this study; scoring can begin as soon as the first is there.</p>
      <a class="button main" href="#/upload"><Icon name="upload" /><span>Add pictures</span></a>
    </Empty></div>
  )
}

function ReviewOf({ id }: { id: number }) {
  const item = itemOf(id).value
  const detail = useSignal<ImageDetail | null>(null)
  const wrong = useSignal('')
  const active = useSignal<string | null>(null)
  const map = useSignal(false)
  const help = useSignal(false)
  const seconds = useClock(id)

  const shownId = useRef(id)
  shownId.current = id                   // an answer about the picture before comes too late
  const read = () => readImage(id).then((d) => { if (shownId.current === id) { detail.value = d; wrong.value = '' } })
    .catch((e: ApiError) => { if (shownId.current === id && !itemOf(id).value) wrong.value = e.message })
  useEffect(() => {
    detail.value = null
    const known = itemOf(id).value
    active.value = known ? firstOpen(known) : null
    void read().then(() => { if (shownId.current === id) active.value ??= firstOpen(itemOf(id).value) })
    void warmNext(id)
  }, [id])
  useEffect(() => { if (imageChanged.value.id === id && imageChanged.value.n) void read() }, [imageChanged.value])

  const mine = overlaid(id, item?.mine ?? {})
  const act = actions(id, active, seconds)
  useKeys((key, e) => reviewKey(key, e, act, { map, help, active }))

  if (wrong.value) return <div class="page narrow"><Empty title="This picture cannot be shown"><p>{wrong.value}</p><a class="button" href="#/images">All pictures</a></Empty></div>
  return (
    <div class={`review ${listOpen.value ? 'with-list' : ''}`}>
      <WorkList current={id} />
      <section class="stage" aria-label="Picture">
        {item ? <Viewer item={item} map={map.value} mapMeasure={active.value ?? measures.value[0]?.key} hasModel={Boolean(study.value?.model)}
          onMap={() => { map.value = !map.value }} /> : <Spinner />}
      </section>
      <aside class="scores" aria-label="Scores">
        {item && <ScoreSide item={item} detail={detail.value} mine={mine} act={act} active={active} onHelp={() => { help.value = true }} />}
      </aside>
      {help.value && <KeyHelp onClose={() => { help.value = false }} />}
    </div>
  )
}

const firstOpen = (item: Item | null) => {
  if (!item) return null
  return (missing(measures.value, overlaid(item.id, item.mine ?? {}))[0] ?? measures.value[0])?.key ?? null
}

async function warmNext(id: number) {
  const next = await api.next(id, 'next', 'unscored').catch(() => null)
  if (!next?.id || next.id === id) return
  const item = await readImage(next.id).catch(() => null)
  if (item) warm(item)
}

type Cell = { value: string | null }
type Actions = ReturnType<typeof actions>

// Every action reads the scores as they are at that moment: two quick keys fall into one drawing of the page.
function actions(id: number, active: Cell, seconds: () => number) {
  const all = measures.value
  const item = () => itemOf(id).value
  const mine = () => overlaid(id, item()?.mine ?? {})
  const allowedToScore = () => {
    if (mayScore.value && item()) return true
    say('You may look, not score: ask an administrator for the role “scorer”.', true)
    return false
  }
  // Until the picture's details are there no measure is active yet: the first open one is meant.
  const current = () => all.find((m) => m.key === (active.value ?? firstOpen(item()))) ?? all[0]
  const move = (by: 1 | -1) => {
    const from = current()
    const to = all[all.findIndex((m) => m.key === from?.key) + by]
    if (to) active.value = to.key
    return Boolean(to)                 // beyond the last measure Tab goes on to the rest of the page
  }
  const set = (m: Measure, value: number | null) => {
    if (!allowedToScore() || given(mine(), m.key) === value) return
    enqueue({ kind: 'score', uid: newUid(), image: id, measure: m.key, value, seconds: seconds(), draft_visible: draftSeen(item()) })
  }
  const onward = async (direction: 'next' | 'previous') => {
    const next = await api.next(id, direction, 'unscored').catch((e: Error) => { say(e.message, true); return null })
    if (next?.id && next.id !== id) go(`/review/${next.id}`)
    else if (next) say(direction === 'next' ? 'Nothing unscored is left.' : 'Nothing unscored before this one.')
  }
  return {
    set, move, current, onward,
    digit(text: string) {
      const m = current()
      if (!m) return
      const value = Number(text)
      if (!allowed(m, value)) return say(`${m.name} goes from ${shown(m.low)} to ${shown(m.high)} in steps of ${m.step}.`, true)
      active.value = m.key               // what is scored now is open no more
      set(m, value)
      move(1)
    },
    step(by: 1 | -1) { const m = current(); if (m) set(m, stepped(m, given(mine(), m.key), by, draftSeen(item()) ? given(item()?.draft, m.key) : null)) },
    clear() { const m = current(); if (m) set(m, null) },
    accept() {
      const open = missing(all, mine())
      if (!open.length) return void onward('next')
      if (!draftSeen(item())) return say(item()?.draft_hidden ? 'Blind first: the draft appears once you have scored.' : 'There is no draft to take over.')
      for (const m of open) { const v = given(item()?.draft, m.key); if (v !== null) set(m, v) }
    },
    undo() { if (allowedToScore()) enqueue({ kind: 'undo', uid: newUid(), image: id }) },
    flag() {
      const now = item()
      if (allowedToScore() && now) enqueue({ kind: 'flag', uid: newUid(), image: id, on: !overlaidFlag(id, now.flagged) })
    },
    async along(by: 1 | -1) { const to = await neighbour(id, by); if (to) go(`/review/${to}`) },
  }
}

function reviewKey(key: string, e: KeyboardEvent, act: Actions, page: { map: Cell2; help: Cell2; active: Cell }): boolean {
  const lone = Boolean(document.activeElement?.matches('body, main') || document.activeElement?.closest('.osd'))
  if (/^\d$/.test(key)) act.digit(key)
  else if (key === '[' || key === '-') act.step(-1)
  else if (key === ']' || key === '+') act.step(1)
  else if (key === 'Backspace' || key === 'Delete') act.clear()
  else if (key === 'Enter') act.accept()
  else if (key === 'Tab' && lone) return act.move(e.shiftKey ? -1 : 1)
  else if (key === 'ArrowDown') act.move(1)
  else if (key === 'ArrowUp') act.move(-1)
  else if (key === 'n') void act.onward('next')
  else if (key === 'p') void act.onward('previous')
  else if (key === 'ArrowRight' || key === 'PageDown') void act.along(1)
  else if (key === 'ArrowLeft' || key === 'PageUp') void act.along(-1)
  else if (key === 'u') act.undo()
  else if (key === 'x') act.flag()
  else if (key === 'g' && study.value?.model) page.map.value = !page.map.value
  else if (key === '?') page.help.value = true
  else return false
  return true
}
type Cell2 = { value: boolean }

interface SideProps { item: Item; detail: ImageDetail | null; mine: Scores; act: Actions; active: Cell; onHelp: () => void }

function ScoreSide({ item, detail, mine, act, active, onHelp }: SideProps) {
  const seen = draftSeen(item)
  const done = complete(measures.value, mine)
  return (
    <>
      <Head item={item} act={act} />
      <Notices item={item} />
      <div class="score-rows">
        {measures.value.map((m) => (
          <ScoreRow key={m.key} measure={m} value={given(mine, m.key)} draft={seen ? given(item.draft, m.key) : null}
            active={active.value === m.key} disabled={!mayScore.value} onActive={() => { active.value = m.key }} stillActive={() => active.value === m.key}
            onSet={(v) => { active.value = m.key; act.set(m, v); if (v !== null && !fineStep(m)) act.move(1) }} />
        ))}
      </div>
      {mayScore.value && (
        <div class="score-actions">
          {done || !seen
            ? <Button look="main" icon="right" hint="n" onClick={() => void act.onward('next')}>Next unscored</Button>
            : <Button look="main" icon="check" hint="Enter" onClick={act.accept}>Accept draft</Button>}
          <Button icon="undo" hint="u" title="Undo the last change" onClick={act.undo}>Undo</Button>
        </div>
      )}
      <Others item={item} detail={detail} />
      {mayScore.value && detail && <ConsensusBox item={item} detail={detail} />}
      <footer class="side-foot">
        <a href={`#/image/${item.id}`}><Icon name="clock" size={16} /> Every change</a>
        <button type="button" class="link" onClick={onHelp}><kbd>?</kbd> Keys</button>
      </footer>
    </>
  )
}

const fineStep = (m: Measure) => m.step < 1

function Head({ item, act }: { item: Item; act: Actions }) {
  const flagged = overlaidFlag(item.id, item.flagged)
  return (
    <header class="side-head">
      <div class="side-title">
        <h1>{item.serial || item.name}</h1>
        <Button look="quiet" icon="flag" class={flagged ? 'flagged' : ''} aria-pressed={flagged} hint="x" disabled={!mayScore.value}
          aria-label={flagged ? 'Take the flag away' : 'Flag for discussion'} title="Flag for discussion" onClick={act.flag} />
        <Button look="quiet" icon="left" aria-label="Previous picture" title="Previous picture (←)" onClick={() => void act.along(-1)} />
        <Button look="quiet" icon="right" aria-label="Next picture" title="Next picture (→)" onClick={() => void act.along(1)} />
      </div>
      <p class="side-name" title={item.name}>{item.name}</p>
      <p class="side-facts">
        {item.group && <Chip>{item.group}</Chip>}
        {item.width && item.height && <span>{item.width} × {item.height} px</span>}
        {item.um_per_px && <span>{Number(item.um_per_px.toPrecision(3))} µm/px</span>}
      </p>
    </header>
  )
}

function Notices({ item }: { item: Item }) {
  return (
    <>
      {item.changed && <p class="notice warn">Another picture came under this name: the scores are those of the earlier one, please look again.</p>}
      {item.status === 'Failed' && <p class="notice bad">No draft: {item.reason || 'the picture could not be read'}</p>}
      {(item.status === 'Pending' || item.status === 'Processing') && <p class="notice">The draft is being made; you can score already.</p>}
      {item.draft_hidden && <p class="notice">Blind first: the draft appears once you have scored all {measures.value.length}.</p>}
      {!study.value?.model && item.status !== 'Failed' && <NoModel />}
      {item.draft && !item.draft_hidden && <p class="model-line">Draft by model {item.model_version ?? ''}</p>}
    </>
  )
}

function NoModel() {
  return (
    <details class="notice quiet-notice"><summary>No drafts: this study has no model yet.</summary>
      <p>Start with one: <code>histokit review STUDY --model FILE</code>; or train one of your own scores once there are enough: <code>histokit review train STUDY</code>.</p>
      {isAdmin.value && <p><a href="#/study">Study settings</a></p>}
    </details>
  )
}

function Others({ item, detail }: { item: Item; detail: ImageDetail | null }) {
  const people = detail?.people ?? []
  if (!people.length && !item.others) return null
  if (!people.length) return <p class="others-note">{item.others === 1 ? 'One other person has' : `${item.others} others have`} scored this picture.</p>
  return (
    <div class="others"><table>
      <caption>Everyone’s scores</caption>
      <thead><tr><th scope="col">Person</th>{measures.value.map((m) => <th scope="col" key={m.key} title={m.name}><abbr title={m.name}>{m.name.slice(0, 4)}</abbr></th>)}</tr></thead>
      <tbody>
        {people.map((p) => <ScoreLine key={p.id} name={p.name} scores={p.scores} />)}
        {item.consensus && <ScoreLine name="Consensus" scores={item.consensus} strong />}
      </tbody>
    </table></div>
  )
}

function ScoreLine({ name, scores, strong }: { name: string; scores: Scores; strong?: boolean }) {
  return (
    <tr class={strong ? 'strong' : ''}><th scope="row">{name}</th>
      {measures.value.map((m) => <td key={m.key}>{shown(given(scores, m.key), m)}</td>)}</tr>
  )
}

export function KeyHelp({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title="Keys" onClose={onClose}>
      <table class="keys"><tbody>
        {keyTable.map(([key, what]) => <tr key={key}><th scope="row">{key.split('  ').map((k) => <kbd key={k}>{k}</kbd>)}</th><td>{what}</td></tr>)}
      </tbody></table>
      <p>Keys do nothing while you type in a field.</p>
    </Dialog>
  )
}
