// How far people agree, with each other and with the model; which pictures split them; what to score next.
import { useSignal } from '@preact/signals'
import { useEffect } from 'preact/hooks'
import { api, thumb } from '../api'
import { shown, signed } from '../scores'
import { itemOf, measures, readImage } from '../state'
import type { Agreement, Confusion, Interval, Measure } from '../types'
import { Empty, Spinner } from '../ui'

const two = (v: number | null) => (v === null ? '–' : v.toFixed(2).replace('-', '−'))

/** The estimate as a point on its interval, from −1 or 0 to 1, with the numbers beside it. */
function Estimate({ of }: { of: Interval }) {
  if (of.value === null) return <span class="none">–</span>
  const place = (v: number) => `${Math.max(0, Math.min(1, v)) * 100}%`
  const low = of.low ?? of.value
  const high = of.high ?? of.value
  return (
    <span class="estimate">
      <span class="track" aria-hidden="true">
        <span class="interval" style={{ left: place(low), right: `calc(100% - ${place(high)})` }} />
        <span class="point" style={{ left: place(of.value) }} />
      </span>
      <span class="numbers"><b>{two(of.value)}</b> <small>{two(of.low)} to {two(of.high)}</small></span>
    </span>
  )
}

const kinds: [keyof Pick<Agreement['measures'][string], 'kappa' | 'icc' | 'alpha' | 'ac2'>, string, string][] = [
  ['kappa', 'Weighted κ', 'Cohen’s kappa with quadratic weights, mean over the pairs of people'],
  ['icc', 'ICC(2,1)', 'Intraclass correlation, two-way random effects, single scores, absolute agreement'],
  ['alpha', 'Krippendorff’s α', 'Ordinal'],
  ['ac2', 'Gwet’s AC2', 'Quadratic weights; steadier than κ where nearly all scores are the same'],
]

function Overall({ a }: { a: Agreement }) {
  return (
    <div class="table-frame"><table class="table agreement-table">
      <caption>Between people; the interval (95 %) is over samples. 1: always the same score, 0: no better than chance.</caption>
      <thead><tr><th scope="col">Measure</th>{kinds.map(([k, name, what]) => <th scope="col" key={k} title={what}>{name}</th>)}<th scope="col" class="number">Pictures</th></tr></thead>
      <tbody>{measures.value.filter((m) => a.measures[m.key]).map((m) => {
        const of = a.measures[m.key]!
        return <tr key={m.key}><th scope="row">{m.name}</th>{kinds.map(([k]) => <td key={k}><Estimate of={of[k]} /></td>)}<td class="number">{of.n}</td></tr>
      })}</tbody>
    </table></div>
  )
}

function Pairs({ a }: { a: Agreement }) {
  const measure = useSignal(measures.value[0]?.key ?? '')
  const rows = a.pairs.filter((p) => p.measure === measure.value)
  const m = measures.value.find((x) => x.key === measure.value)
  const cell = (x: string, y: string) => rows.find((p) => (p.a === x && p.b === y) || (p.a === y && p.b === x))
  return (
    <section aria-label="Pairs"><h2>Pair by pair</h2>
      <Picker value={measure} label="Measure of the pairs" />
      <div class="table-frame"><table class="table pairs"><caption>Weighted κ with its interval; below it how much higher the person of the column scores than that of the row.</caption>
        <thead><tr><th scope="col"><span class="hidden">Person</span></th>{a.raters.map((r) => <th scope="col" key={r}>{r}</th>)}</tr></thead>
        <tbody>{a.raters.map((row) => <tr key={row}><th scope="row">{row}</th>{a.raters.map((column) => {
          const p = row === column ? null : cell(row, column)
          if (!p) return <td key={column} class="none">{row === column ? '' : '–'}</td>
          const higher = p.a === row ? p.b_minus_a : -p.b_minus_a
          return <td key={column} class={`tone-${tone(p.kappa.value)}`}><b>{two(p.kappa.value)}</b> <small>{two(p.kappa.low)} to {two(p.kappa.high)}</small><br /><small>{signed(Number(higher.toFixed(2)))} · n {p.n}</small></td>
        })}</tr>)}</tbody>
      </table></div>
      {!rows.length && <p class="none">No two raters have scored the same pictures for {m?.name ?? 'this measure'} yet.</p>}
    </section>
  )
}

const tone = (v: number | null) => (v === null ? 0 : Math.max(0, Math.min(5, Math.floor(v * 5 + 0.5))))

function Picker({ value, label }: { value: { value: string }; label: string }) {
  return (
    <div class="toggles" role="group" aria-label={label}>{measures.value.map((m) => (
      <button type="button" key={m.key} class={`toggle ${value.value === m.key ? 'on' : ''}`} aria-pressed={value.value === m.key}
        onClick={() => { value.value = m.key }}>{m.name}</button>))}</div>
  )
}

function Matrix({ title, rows, columns, cells, levels, m }: { title: string; rows: string; columns: string; cells: number[][]; levels: number[]; m?: Measure }) {
  const most = Math.max(1, ...cells.flat())
  const total = cells.flat().reduce((x, y) => x + y, 0)
  return (
    <figure class="matrix"><figcaption>{title} <small>{rows} down, {columns} across · {total}</small></figcaption>
      <div class="matrix-frame"><table>
        <thead><tr><th><span class="hidden">{rows}</span></th>{levels.map((l) => <th scope="col" key={l}>{shown(l, m)}</th>)}</tr></thead>
        <tbody>{cells.map((row, i) => <tr key={i}><th scope="row">{shown(levels[i], m)}</th>{row.map((v, j) => (
          <td key={j} class={`heat-${v ? 1 + Math.floor((v / most) * 7.99) : 0} ${i === j ? 'same' : ''}`}>{v || ''}</td>))}</tr>)}</tbody>
      </table></div></figure>
  )
}

function Confusions({ a }: { a: Agreement }) {
  const measure = useSignal(measures.value[0]?.key ?? '')
  const c: Confusion | undefined = a.confusion[measure.value]
  const m = measures.value.find((x) => x.key === measure.value)
  return (
    <section aria-label="Confusion"><h2>Which scores are confused</h2>
      <Picker value={measure} label="Measure of the matrices" />
      {c && <div class="matrices">
        <Matrix title="Among people" rows="one" columns="another" cells={c.people} levels={c.levels} m={m} />
        {c.model && <Matrix title="People and the model" rows="people" columns="model" cells={c.model} levels={c.levels} m={m} />}
      </div>}
    </section>
  )
}

function Split({ image, measure, low, high }: Agreement['most_split'][number]) {
  const item = itemOf(image).value
  const m = measures.value.find((x) => x.key === measure)
  useEffect(() => { if (!item) void readImage(image).catch(() => null) }, [image])
  return (
    <a class="split" href={`#/review/${image}`}>
      {item && <img src={thumb(item, 176)} alt="" width="88" height="88" loading="lazy" />}
      <span><b>{item?.serial || `Picture ${image}`}</b><small>{m?.name ?? measure}: {shown(low, m)} to {shown(high, m)}</small></span>
    </a>
  )
}

function Pull({ pull }: { pull: NonNullable<Agreement['pull']> }) {
  if (!pull.n_seen && !pull.n_blind) return null
  const share = (i: Interval) => (i.value === null ? '–' : `${(i.value * 100).toFixed(1)} % (${((i.low ?? i.value) * 100).toFixed(1)} to ${((i.high ?? i.value) * 100).toFixed(1)})`)
  return (
    <section aria-label="Pull of the draft"><h2>Does the draft pull?</h2>
      <div class="card"><p>Mean distance of a person’s score from the draft, in shares of the scale.</p>
        <dl class="metrics">
          <div><dt>Draft not seen ({pull.n_blind} scores)</dt><dd>{share(pull.blind)}</dd></div>
          <div><dt>Draft seen ({pull.n_seen} scores)</dt><dd>{share(pull.seen)}</dd></div>
          <div><dt>Difference: the pull</dt><dd>{share(pull.pull)}</dd></div>
        </dl></div>
    </section>
  )
}

function Next() {
  const next = useSignal<{ id: number; reason: string }[] | null>(null)
  useEffect(() => { api.active().then((x) => { next.value = x }).catch(() => { next.value = [] }) }, [])
  if (!next.value?.length) return null
  return (
    <section aria-label="What to score next"><h2>What to score next</h2><p class="quiet-text">The pictures that would teach the model most, with the reason.</p>
      <div class="splits">{next.value.slice(0, 12).map((n) => <NextOne key={n.id} {...n} />)}</div></section>
  )
}

function NextOne({ id, reason }: { id: number; reason: string }) {
  const item = itemOf(id).value
  useEffect(() => { if (!item) void readImage(id).catch(() => null) }, [id])
  return (
    <a class="split" href={`#/review/${id}`}>{item && <img src={thumb(item, 176)} alt="" width="88" height="88" loading="lazy" />}
      <span><b>{item?.serial || `Picture ${id}`}</b><small>{reason}</small></span></a>
  )
}

export function AgreementPage() {
  const a = useSignal<Agreement | null>(null)
  const wrong = useSignal('')
  useEffect(() => { api.agreement().then((x) => { a.value = x }).catch((e: Error) => { wrong.value = e.message }) }, [])
  if (wrong.value) return <div class="page narrow"><Empty title="The agreement cannot be shown"><p>{wrong.value}</p></Empty></div>
  if (!a.value) return <div class="page"><Spinner label="Computing the intervals…" /></div>
  const found = a.value
  const some = Object.values(found.measures).some((m) => m.n > 1) || found.pairs.length > 0
  return (
    <div class="page">
      <header class="page-head"><h1>Agreement</h1></header>
      {some
        ? <><Overall a={found} /><Pairs a={found} /><Confusions a={found} /></>
        : <Empty title="Nothing to compare yet"><p>Agreement needs two people, or a person and the model, who have scored the same pictures.</p></Empty>}
      {found.most_split.length > 0 && <section aria-label="Most split"><h2>Pictures that split people most</h2>
        <div class="splits">{found.most_split.slice(0, 12).map((s) => <Split key={s.image} {...s} />)}</div></section>}
      {found.pull && <Pull pull={found.pull} />}
      <Next />
    </div>
  )
}
