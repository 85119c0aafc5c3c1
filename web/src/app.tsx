// The frame of every page: where one is, whether everything is saved, who is signed in.
import { useEffect } from 'preact/hooks'
import { discard, flush, problem, refused, saveState, waiting } from './outbox'
import { address, failure, go, isAdmin, itemOf, logout, mayScore, measures, parts, queueCounts, readSession, session, study, theme, toasts } from './state'
import { Button, Icon, Spinner, type IconName } from './ui'
import { addFiles, filesOf, uploads } from './uploads'
import { AgreementPage } from './pages/agreement'
import { ImagePage } from './pages/image'
import { Images } from './pages/images'
import { Login, Setup } from './pages/login'
import { People } from './pages/people'
import { Review } from './pages/review'
import { StudyPage } from './pages/study'
import { UploadPage } from './pages/upload'

function Tab({ to, icon, children, badge }: { to: string; icon: IconName; children: string; badge?: number }) {
  const on = parts.value[0] === to || (to === 'review' && parts.value.length === 0) || (to === 'images' && parts.value[0] === 'image')
  return (
    <a class={`tab ${on ? 'on' : ''}`} href={`#/${to}`} aria-current={on ? 'page' : undefined}>
      <Icon name={icon} /><span>{children}</span>{badge ? <b class="badge" aria-label={`${badge} in the queue`}>{badge}</b> : null}
    </a>
  )
}

function Saving() {
  const state = saveState.value
  const n = waiting.value.length
  const text = { idle: '', saving: 'Saving…', saved: 'Saved', failed: 'Failed' }[state]
  return (
    <span class={`saving ${state}`} role="status" aria-live="polite" data-state={state}>
      {state === 'saved' && <Icon name="check" size={15} />}
      <span>{text}</span>
      {state === 'failed' && <button type="button" class="link" title={`${problem.value ?? ''}; ${n} kept in this browser until then`} onClick={() => void flush()}>retry ({n})</button>}
    </span>
  )
}

const themes = { auto: ['auto', 'light'], light: ['sun', 'dark'], dark: ['moon', 'auto'] } as const

function Top() {
  const queued = queueCounts.value.Pending + queueCounts.value.Processing + uploads.value.filter((u) => u.state === 'sending' || u.state === 'waiting').length
  const s = session.value!
  const [icon, next] = themes[theme.value]
  return (
    <header class="top">
      <a class="brand" href="#/" title={study.value?.name}><img src="/favicon.svg" width="24" height="24" alt="" /><span>{study.value?.name ?? 'histokit'}</span></a>
      <nav class="tabs" aria-label="Pages">
        <Tab to="review" icon="review">Review</Tab>
        <Tab to="images" icon="list">Pictures</Tab>
        <Tab to="upload" icon="upload" badge={queued}>Add</Tab>
        <Tab to="agreement" icon="chart">Agreement</Tab>
        {isAdmin.value && !s.single && <Tab to="people" icon="people">People</Tab>}
        <Tab to="study" icon="settings">Study</Tab>
      </nav>
      <Saving />
      <Button look="quiet" icon={icon} aria-label={`Colours: ${theme.value}; change to ${next}`} title={`Colours: ${theme.value}`} onClick={() => { theme.value = next }} />
      {!s.single && s.user && (
        <span class="who"><span title={`Signed in as ${s.user.name}, ${s.role}`}>{s.user.name}</span>
          <Button look="quiet" icon="exit" aria-label="Sign out" title="Sign out" onClick={() => void logout()} /></span>
      )}
    </header>
  )
}

function Refused() {
  if (!refused.value.length) return null
  return (
    <div class="refused" role="alert">
      {refused.value.slice(0, 5).map((e) => {
        const key = e.edit.kind === 'score' ? e.edit.measure : e.edit.kind
        const name = measures.value.find((m) => m.key === key)?.name ?? key
        return (
          <p key={e.key}><span>Not saved: {name} of {itemOf(e.edit.image).value?.serial || `picture ${e.edit.image}`}. {e.refused}</span>
            <a href={`#/review/${e.edit.image}`}>Look</a><button type="button" class="link" onClick={() => discard(e)}>Give it up</button></p>
        )
      })}
    </div>
  )
}

function Page() {
  const [first, second] = parts.value
  const id = second ? Number(second) : null
  switch (first) {
    case undefined: case 'review': return <Review id={Number.isInteger(id) ? id : null} />
    case 'images': return <Images />
    case 'image': return id ? <ImagePage id={id} /> : <Images />
    case 'upload': return <UploadPage />
    case 'agreement': return <AgreementPage />
    case 'people': return isAdmin.value ? <People /> : <Images />
    case 'study': return <StudyPage />
    default: go('/'); return null
  }
}

/** Files that are dropped anywhere go up. */
function useDropAnywhere() {
  useEffect(() => {
    const over = (e: DragEvent) => { if (e.dataTransfer?.types.includes('Files')) e.preventDefault() }
    const drop = (e: DragEvent) => {
      if (e.defaultPrevented || !e.dataTransfer?.types.includes('Files')) return
      e.preventDefault()
      if (mayScore.value) void filesOf(e.dataTransfer).then(addFiles)
    }
    addEventListener('dragover', over)
    addEventListener('drop', drop)
    return () => { removeEventListener('dragover', over); removeEventListener('drop', drop) }
  }, [])
}

const titles: Record<string, string> = { images: 'Pictures', image: 'Picture', upload: 'Add pictures', agreement: 'Agreement', people: 'People', study: 'Study' }

function useTitle() {
  useEffect(() => {
    const id = Number(parts.value[1])
    const page = titles[parts.value[0] ?? ''] ?? (id ? itemOf(id).value?.serial || 'Review' : 'Review')
    document.title = `${page} · ${study.value?.name ?? 'histokit review'}`
  }, [address.value, study.value?.name])
}

function Toasts() {
  return <div class="toasts" role="status" aria-live="polite">{toasts.value.map((t) => <p key={t.id} class={`toast ${t.bad ? 'bad' : ''}`}>{t.text}</p>)}</div>
}

export function App() {
  useDropAnywhere()
  useTitle()
  const s = session.value
  if (!s) return <main class="gate">{failure.value ? <div class="gate-box"><h1>The server cannot be reached</h1><p>{failure.value}</p><Button look="main" onClick={() => void readSession()}>Again</Button></div> : <Spinner />}</main>
  if (s.setup_needed && !s.single) return <><Setup /><Toasts /></>
  if (!s.single && !s.user) return <><Login /><Toasts /></>
  return (
    <div class="app">
      <a class="skip" href="#main" onClick={(e) => { e.preventDefault(); document.getElementById('main')?.focus() }}>To the content</a>
      <Top />
      <Refused />
      <main id="main" tabIndex={-1}><Page /></main>
      <Toasts />
    </div>
  )
}
